//! What is told of which journals, in which order.

use super::*;
use crate::cli::watch::target::Below;

/// A tree of plain files that looks like a mounted one.
struct Tree(tempfile::TempDir);

impl Tree {
    fn new() -> Self {
        let tree = Tree(tempfile::tempdir().unwrap());
        tree.write(".ctlfs/ready", "");
        tree
    }

    fn write(&self, path: &str, text: &str) {
        let path = self.0.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn table(&self, table: &str, floor: u64, seqs: &[u64], note: &str) {
        let mut text = format!("{{\"floor\":{floor}}}\n");
        for seq in seqs {
            text.push_str(&line(*seq, note));
        }
        self.write(&format!(".ctlfs/changes/{table}.ndjson"), &text);
        let last = seqs.last().copied().unwrap_or(floor);
        self.write(&format!("{table}/.seq"), &format!("{last}\n"));
    }

    fn position(&self, seq: u64) {
        self.write(".ctlfs/seq", &format!("{seq}\n"));
    }

    fn follower(&self, targets: &[Target], cursor: Option<u64>) -> Follower {
        Follower::new(self.0.path(), targets, cursor)
    }
}

fn line(seq: u64, note: &str) -> String {
    format!(
        "{{\"seq\":{seq},\"begin\":{seq},\"time\":\"T\",\"changes\":[{{\"path\":\"x\",\
         \"key\":[\"x\"],\"kind\":\"updated\",\"old\":{{\"note\":\"{note}\"}},\
         \"new\":{{\"note\":null}}}}]}}\n"
    )
}

fn news(follower: &mut Follower) -> (u64, Vec<Delivery>) {
    match follower.look().unwrap() {
        Look::News { upto, deliveries } => (upto, deliveries),
        other => panic!("{other:?}"),
    }
}

fn seqs(deliveries: &[Delivery]) -> Vec<u64> {
    deliveries.iter().map(Delivery::seq).collect()
}

#[test]
fn transactions_of_all_tables_come_in_order_up_to_the_position() {
    let tree = Tree::new();
    tree.position(5);
    tree.table("app/flags", 0, &[2, 5, 6], "a");
    tree.table("app/limits", 0, &[3, 5, 9], "b");
    tree.table("other/t01", 0, &[4], "c");
    let mut follower = tree.follower(&[Target::All], Some(2));
    let (upto, found) = news(&mut follower);
    assert_eq!((upto, seqs(&found)), (5, vec![3, 4, 5]));
    assert!(found[2].to_line().contains("app/limits/x"), "{found:?}");
    assert!(matches!(follower.look().unwrap(), Look::Same));
    tree.position(9);
    assert_eq!(seqs(&news(&mut follower).1), [6, 9]);
    let mut family = tree.follower(&[Target::Family("other".into())], Some(0));
    assert_eq!(seqs(&news(&mut family).1), [4]);
}

#[test]
fn without_a_beginning_it_is_now() {
    let tree = Tree::new();
    tree.position(5);
    tree.table("app/flags", 0, &[2, 5], "a");
    let mut follower = tree.follower(&[Target::All], None);
    assert_eq!(news(&mut follower), (5, vec![]));
    fs::remove_file(tree.0.path().join(".ctlfs/ready")).unwrap();
    let mut early = tree.follower(&[Target::All], None);
    assert!(matches!(early.look().unwrap(), Look::Away(_)));
}

#[test]
fn long_journals_are_read_from_their_end() {
    let tree = Tree::new();
    let all: Vec<u64> = (11..=3_000).collect();
    tree.position(3_000);
    tree.table("app/flags", 10, &all, &"n".repeat(100));
    for cursor in [10, 11, 1_000, 2_500, 2_999] {
        let mut follower = tree.follower(&[Target::All], Some(cursor));
        let expected: Vec<u64> = (cursor + 1..=3_000).collect();
        assert_eq!(seqs(&news(&mut follower).1), expected, "behind {cursor}");
    }
}

#[test]
fn history_that_is_gone_is_a_gap() {
    let tree = Tree::new();
    tree.position(30);
    tree.table("app/flags", 10, &[12, 30], "a");
    let mut follower = tree.follower(&[Target::All], Some(7));
    let (_, found) = news(&mut follower);
    assert_eq!(found[0], Delivery::Gap(7, 10));
    assert_eq!(seqs(&found), [10, 12, 30]);
    // A table that has not changed since has missed nothing, wherever the journal begins.
    tree.position(90);
    tree.table("app/limits", 80, &[], "b");
    tree.write("app/limits/.seq", "5\n");
    let (upto, found) = news(&mut follower);
    assert_eq!((upto, found), (90, vec![]));
}

#[test]
fn tables_come_and_go() {
    let tree = Tree::new();
    tree.position(1);
    let mut follower = tree.follower(&[Target::Family("app".into())], None);
    news(&mut follower);
    tree.position(4);
    tree.table("app/flags", 0, &[4], "a");
    assert_eq!(seqs(&news(&mut follower).1), [4]);
    fs::remove_dir_all(tree.0.path().join("app/flags")).unwrap();
    tree.position(6);
    let (_, found) = news(&mut follower);
    assert_eq!(seqs(&found), [6]);
    assert!(found[0].to_line().ends_with("app/flags: dropped\n"));
}

#[test]
fn a_tree_that_is_away_is_waited_for() {
    let tree = Tree::new();
    let mut follower = tree.follower(&[Target::All], Some(3));
    assert!(matches!(follower.look().unwrap(), Look::Away(_)));
    tree.position(2);
    assert!(matches!(follower.look().unwrap(), Look::Away(_)));
    tree.position(4);
    assert_eq!(news(&mut follower), (4, vec![]));
}

#[test]
fn a_tree_that_goes_during_a_look_has_dropped_nothing() {
    let tree = Tree::new();
    tree.position(5);
    tree.table("app/flags", 0, &[2, 5], "a");
    let mut follower = tree.follower(&[Target::All], None);
    news(&mut follower);
    tree.position(7);
    tree.table("app/flags", 0, &[2, 5, 6, 7], "a");
    let mount = fs::metadata(tree.0.path()).unwrap().dev();
    let away = |look| matches!(look, Ok(Look::Away(_)));
    assert!(away(follower.read(mount + 1, 5, 7)));
    assert!(away(follower.read(mount, 5, 8)));
    fs::rename(tree.0.path().join("app"), tree.0.path().join(".app")).unwrap();
    fs::remove_file(tree.0.path().join(".ctlfs/seq")).unwrap();
    assert!(away(follower.read(mount, 5, 7)));
    assert_eq!(follower.cursor(), Some(5));
    fs::rename(tree.0.path().join(".app"), tree.0.path().join("app")).unwrap();
    tree.position(7);
    assert_eq!(seqs(&news(&mut follower).1), [6, 7]);
}

#[test]
fn a_glimpse_sees_what_is_watched() {
    let tree = Tree::new();
    tree.position(5);
    tree.table("app/flags", 0, &[2, 5], "a");
    let table = Target::Table("app".into(), "flags".into(), Below::All);
    let mut follower = tree.follower(&[table], None);
    news(&mut follower);
    follower.glimpse(true);
    assert!(!follower.glimpse(false) && !follower.glimpse(true));
    tree.position(6);
    assert!(!follower.glimpse(false));
    tree.table("app/flags", 0, &[2, 5, 7], "a");
    assert!(follower.glimpse(false));
    assert!(!follower.glimpse(false));
}

#[test]
fn a_mount_without_a_record_of_changes_says_so() {
    let tree = Tree::new();
    tree.position(5);
    tree.write("app/flags/.seq", "5\n");
    let mut follower = tree.follower(&[Target::All], Some(1));
    let Hopeless(why) = follower.look().unwrap_err();
    assert!(why.contains("keeps no record of changes"), "{why}");
}
