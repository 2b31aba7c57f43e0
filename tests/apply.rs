//! `ctlfs apply`, `put` and `delete`, as the commands run them: documents, notations, and errors
//! that name file, line and field.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::path::Path;

use clap::{Args, Parser};
use common::mariadb;
use ctlfs::cli::{self, Error};
use ctlfs::executive::{self, Applied, Document, Executive};
use ctlfs::ledger::{self, OriginUrl};
use ctlfs::model::Seq;

const FLAGS: &str = "\
families:
  app:
    tables:
      flags:
        fields: {name: string, enabled: integer, rollout: decimal, note: text, icon: binary}
        key: [name]
        rows:
          - {name: new-checkout, enabled: 9007199254740993, rollout: 0.25, note: \"half of the EU\"}
          - {name: \"007\", enabled: true, rollout: 1, note: null, icon: {hex: \"00ff\"}}
          - name: third
            icon: !!binary AP8=
  edge:
    tables:
      routes:
        fields: {region: string, path: string, weight: integer}
        key: [region, path]
        rows: [{region: eu, path: /, weight: 100}]
";

#[derive(Parser)]
struct Wrap<T: Args> {
    #[command(flatten)]
    args: T,
}

/// Parses a command's arguments behind its `--origin`.
fn parse<T: Args>(origin: &str, args: &[&str]) -> T {
    let all = ["ctlfs", "--origin", origin]
        .into_iter()
        .chain(args.iter().copied());
    Wrap::<T>::try_parse_from(all).unwrap().args
}

fn statements(origin: &str) -> Vec<String> {
    let url: OriginUrl = origin.parse().unwrap();
    let entries = ledger::open(&url).unwrap().fetch(Seq::new(1)).unwrap();
    entries.into_iter().map(|e| e.statement).collect()
}

fn apply(origin: &str, text: &str) -> Result<Applied, String> {
    let document =
        Document::parse("flags.yaml", Path::new("/"), text).map_err(|e| e.to_string())?;
    let mut executive = Executive::open(&origin.parse().unwrap()).unwrap();
    executive::apply(document, &mut executive, &mut |_| ()).map_err(|e| e.to_string())
}

fn embedded(dir: &tempfile::TempDir) -> String {
    let origin = format!("sqlite://{}/ledger.db", dir.path().display());
    cli::init::run(parse(&origin, &[])).unwrap();
    origin
}

fn on_both(scenario: impl Fn(&str)) {
    let dir = tempfile::tempdir().unwrap();
    scenario(&embedded(&dir));
    let database = mariadb::database();
    let origin = database.url();
    cli::init::run(parse(&origin, &[])).unwrap();
    cli::init::run(parse(&origin, &[])).unwrap();
    scenario(&origin);
}

#[test]
fn apply_creates_what_is_missing_and_repeats_nothing() {
    on_both(|origin| {
        let first = apply(origin, FLAGS).unwrap();
        let expected = Applied {
            families: 2,
            tables: 2,
            fields: 0,
            written: 4,
            unchanged: 0,
            seq: first.seq,
        };
        assert_eq!(first, expected);
        let ledger = statements(origin);
        assert_eq!(
            ledger[2..],
            [
                "--- BEGIN",
                "REPLACE INTO app___flags (\"name\",\"enabled\",\"rollout\",\"note\",\"icon\") \
                 VALUES('new-checkout',9007199254740993,0.25,'half of the EU',NULL)",
                "REPLACE INTO app___flags (\"name\",\"enabled\",\"rollout\",\"note\",\"icon\") \
                 VALUES('007',1,1,NULL,x'00ff')",
                "REPLACE INTO app___flags (\"name\",\"enabled\",\"rollout\",\"note\",\"icon\") \
                 VALUES('third',NULL,NULL,NULL,x'00ff')",
                "REPLACE INTO edge___routes (\"region\",\"path\",\"weight\") VALUES('eu','/',100)",
                "--- COMMIT",
            ]
        );
        let again = apply(origin, FLAGS).unwrap();
        let expected = Applied {
            unchanged: 4,
            ..Applied::default()
        };
        assert_eq!(again, expected);
        assert_eq!(statements(origin), ledger);
        // JSON is YAML; a field is added, and the table's other declarations may be left out.
        let more = "{\"families\": {\"app\": {\"tables\": {\"flags\": {\"fields\": {\"owner\": \
                    \"string\"}, \"rows\": [{\"name\": \"007\", \"owner\": \"me\"}]}}}}}";
        let third = apply(origin, more).unwrap();
        assert_eq!((third.fields, third.written), (1, 1));
        assert_eq!(
            statements(origin)[ledger.len()..],
            [
                "ALTER TABLE app___flags ADD COLUMN \"owner\" VARCHAR(191)",
                "REPLACE INTO app___flags \
                 (\"name\",\"enabled\",\"rollout\",\"note\",\"icon\",\"owner\") \
                 VALUES('007',NULL,NULL,NULL,NULL,'me')",
            ]
        );
    });
}

#[test]
fn mistakes_in_a_document_name_file_line_and_field() {
    let dir = tempfile::tempdir().unwrap();
    let origin = embedded(&dir);
    let before = statements(&origin);
    for (find, replace, expected) in [
        (
            "enabled: true",
            "enabled: yes",
            "flags.yaml:9: app/flags row 2, field \"enabled\": expected an integer, found text",
        ),
        (
            "enabled: 9007199254740993",
            "enabled: 9223372036854775808",
            "flags.yaml:8: app/flags row 1, field \"enabled\": the number does not fit",
        ),
        (
            "\"007\"",
            "007.5",
            "flags.yaml:9: app/flags row 2, field \"name\": expected text, found a number",
        ),
        (
            "!!binary AP8=",
            "!!binary hunter!",
            "flags.yaml:11: app/flags row 3, field \"icon\": the base64 text",
        ),
        (
            "!!binary AP8=",
            "{file: no/such/file}",
            "flags.yaml:11: app/flags row 3, field \"icon\": cannot read the file",
        ),
        ("!!binary AP8=", "{hex: 12}", "flags.yaml:11: "),
        (
            "name: third",
            "name: new-checkout",
            "flags.yaml:10: app/flags row 3 has the same key as the row on line 8; remove one of them",
        ),
        (
            "  edge:\n",
            "  APP:\n",
            "flags.yaml:12: the family app stands on line 2 already",
        ),
        (
            "weight: 100}]\n",
            "weight: 100}]\n      ROUTES: {}\n",
            "flags.yaml:18: the table edge/routes stands on line 14 already",
        ),
        (
            "            icon:",
            "            icno:",
            "flags.yaml:11: app/flags row 3, field \"icno\": the table has no such field",
        ),
        (
            "name: third",
            "enabled: 1",
            "flags.yaml:10: app/flags row 3: key field \"name\" is missing",
        ),
        (
            "name: third",
            "name: null",
            "flags.yaml:10: app/flags row 3, field \"name\": a key field cannot be null",
        ),
        (
            "icon: binary",
            "icon: bytes",
            "flags.yaml:5: app/flags: field \"icon\": unknown type \"bytes\"",
        ),
        (
            "[name]",
            "[nmae]",
            "flags.yaml:6: app/flags: key field \"nmae\" is not a field",
        ),
        (
            "        key: [name]\n",
            "",
            "flags.yaml:4: app/flags does not exist yet",
        ),
        ("  edge:", "  e-d:", "flags.yaml:12: invalid family name"),
        ("rows: [", "row: [", "flags.yaml:17: "),
        ("rows: [{", "rows: [[", "flags.yaml:17: "),
        ("  app:", "  app: [", "flags.yaml:"),
    ] {
        assert!(FLAGS.contains(find), "{find}");
        let error = apply(&origin, &FLAGS.replacen(find, replace, 1)).unwrap_err();
        assert!(
            error.starts_with(expected),
            "{error}\ninstead of\n{expected}"
        );
        assert_eq!(error.lines().count(), 1, "{error}");
    }
    assert_eq!(statements(&origin), before);
    apply(&origin, FLAGS).unwrap();
    for (find, replace, expected) in [
        (
            "note: text",
            "note: string",
            "flags.yaml:5: app/flags exists with field \"note\" as text",
        ),
        (
            "key: [region, path]",
            "key: [path, region]",
            "flags.yaml:16: edge/routes exists with the key [region, path]",
        ),
    ] {
        let error = apply(&origin, &FLAGS.replacen(find, replace, 1)).unwrap_err();
        assert!(error.starts_with(expected), "{error}");
    }
}

#[test]
fn a_row_that_the_ledger_cannot_hold_is_found_before_anything_is_changed() {
    let dir = tempfile::tempdir().unwrap();
    let origin = embedded(&dir);
    let before = statements(&origin);
    // The field holds as much; the statement, in which quotes are doubled, does not.
    let long = "''".repeat((8 << 20) - 1);
    let error = apply(
        &origin,
        &FLAGS.replace("note: null", &format!("note: '{long}'")),
    );
    let error = error.unwrap_err();
    assert!(
        error.starts_with("flags.yaml:9: app/flags row 2: "),
        "{:.200}",
        error
    );
    assert!(error.contains("is too large"), "{error:.200}");
    assert_eq!(statements(&origin), before);
}

#[test]
fn the_commands_change_what_they_say() {
    on_both(|origin| {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("flags.yaml");
        std::fs::write(dir.path().join("icon"), [0, 255, 10]).unwrap();
        std::fs::write(&file, FLAGS.replace("!!binary AP8=", "{file: icon}")).unwrap();
        let path = file.to_str().unwrap();
        cli::apply::run(parse(origin, &["-f", path])).unwrap();
        assert!(statements(origin)[5].ends_with("x'00ff0a')"));

        let put = |args: &[&str]| cli::put::run(parse(origin, args));
        let delete = |args: &[&str]| cli::delete::run(parse(origin, args));
        let icon = format!("icon=@{}", dir.path().join("icon").display());
        put(&["app/flags", "name=new-checkout", "note:=null", &icon]).unwrap();
        assert!(
            statements(origin)
                .pop()
                .unwrap()
                .ends_with("VALUES('new-checkout',9007199254740993,0.25,NULL,x'00ff0a')")
        );
        let length = statements(origin).len();
        put(&["app/flags", "name=new-checkout", "rollout=0.25"]).unwrap();
        assert_eq!(statements(origin).len(), length);
        delete(&["edge/routes", "path=/", "region=eu"]).unwrap();
        assert_eq!(
            statements(origin).pop().unwrap(),
            "DELETE FROM edge___routes WHERE \"region\" = 'eu' AND \"path\" = '/'"
        );
        let failed = |result: Result<(), Error>, part: &str| match result {
            Err(Error::Failed(text)) => assert!(text.contains(part), "{text}"),
            other => panic!("{other:?}"),
        };
        let usage = |result: Result<(), Error>, part: &str| match result {
            Err(Error::Usage(text)) => assert!(text.contains(part), "{text}"),
            other => panic!("{other:?}"),
        };
        failed(delete(&["edge/routes", "path=/", "region=eu"]), "no row");
        failed(put(&["app/nothing", "name=a"]), "no table app/nothing");
        failed(
            cli::apply::run(parse(origin, &["-f", "/no/such/file"])),
            "/no/such/file: cannot be opened",
        );
        usage(put(&["flags", "name=a"]), "FAMILY/TABLE");
        usage(
            put(&["app/flags", "enabled=1"]),
            "key field name is missing",
        );
        usage(put(&["app/flags", "name=a", "enabled=x"]), "an integer");
        usage(
            put(&["app/flags", "name=a", "nothing=x"]),
            "no field nothing",
        );
        usage(put(&["app/flags", "name=a", "name=b"]), "twice");
        usage(
            delete(&["app/flags", "name=a", "note=x"]),
            "not a key field",
        );
        assert_eq!(statements(origin).len(), length + 1);
    });
}

#[test]
fn a_password_can_come_from_a_file() {
    let database = mariadb::database();
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), format!("{}\n", database.password())).unwrap();
    let origin = database.url_with_password("wrong");
    let init = |args: &[&str]| cli::init::run(parse(&origin, args));
    let denied = init(&[]).unwrap_err().to_string();
    assert!(denied.contains("refused the login"), "{denied}");
    init(&["--password-file", file.path().to_str().unwrap()]).unwrap();
    let missing = init(&["--password-file", "/no/such/file"]).unwrap_err();
    assert!(missing.to_string().contains("/no/such/file"), "{missing}");
}

#[test]
fn a_wrong_origin_is_a_usage_error_without_the_password() {
    for (origin, part) in [
        ("postgres://me:hunter2@h/db", "not a URL ctlfs knows"),
        ("mysql://me:hunter2@h", "names no database"),
        ("sqlite://ledger.db", "absolute path"),
    ] {
        match cli::init::run(parse(origin, &[])) {
            Err(Error::Usage(text)) => {
                assert!(text.contains(part) && !text.contains("hunter2"), "{text}");
            }
            other => panic!("{other:?}"),
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let origin = format!("sqlite://{}/no/ledger.db", dir.path().display());
    let error = cli::init::run(parse(&origin, &[])).unwrap_err().to_string();
    assert!(error.contains("cannot be created"), "{error}");
}
