//! What status.json says of which state.

use super::*;

const STALE: Duration = Duration::from_secs(30);

fn at(second: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000 + second)
}

fn problem(kind: ProblemKind) -> Option<Problem> {
    Some(Problem {
        kind,
        seq: Some(Seq::new(7)),
        statement: Some("REPLACE INTO app___flags".into()),
        reason: "no such table".into(),
        since: at(0),
    })
}

fn good() -> Progress {
    Progress {
        applied: Seq::new(10),
        applied_time: Some(at(3).into()),
        origin_last: Some(Seq::new(10)),
        last_contact: Some(at(100)),
        caught_up: Some(at(100)),
        ready: true,
        ..Progress::default()
    }
}

#[test]
fn health_follows_contact_and_catching_up() {
    let judge = |change: &dyn Fn(&mut Progress), now| {
        let mut progress = good();
        change(&mut progress);
        health(&progress, at(90), STALE, at(now))
    };
    assert_eq!(judge(&|_| {}, 101), Health::Ok);
    assert_eq!(judge(&|_| {}, 131), Health::Stale);
    assert_eq!(judge(&|_| {}, 50), Health::Ok, "the clock was set back");
    let behind = |p: &mut Progress| p.origin_last = Some(Seq::new(12));
    assert_eq!(judge(&behind, 101), Health::Ok);
    let long = |p: &mut Progress| {
        behind(p);
        p.caught_up = Some(at(20));
    };
    assert_eq!(judge(&long, 101), Health::Behind);
    assert_eq!(judge(&|p| p.ready = false, 101), Health::Starting);
    let origin_gone = |p: &mut Progress| p.problem = problem(ProblemKind::Origin);
    assert_eq!(judge(&origin_gone, 101), Health::Ok, "a hiccup");
    let never = |p: &mut Progress| p.last_contact = None;
    assert_eq!(judge(&never, 101), Health::Starting);
    assert_eq!(judge(&never, 121), Health::Stale);
    assert_eq!(
        judge(
            &|p| {
                never(p);
                origin_gone(p);
            },
            91
        ),
        Health::Stale
    );
    let poison = |p: &mut Progress| p.problem = problem(ProblemKind::Statement);
    assert_eq!(judge(&poison, 101), Health::Error);
    let late = |p: &mut Progress| p.late = vec![Seq::new(4)];
    assert_eq!(judge(&late, 101), Health::Error);
}

fn rendered(progress: &Progress, follows: Follows<'_>) -> Json {
    let requests = BTreeMap::from([("lookup", 3), ("read", 2)]);
    let counters = Counters {
        seq: Seq::new(10),
        families: 1,
        tables: 2,
        requests: &requests,
        requests_total: 5,
        nodes: 4,
        kept_bytes: 0,
        spilled_bytes: 0,
        announced: Announced {
            on: true,
            entries: 12,
            failed: 1,
            times: Some((Duration::from_micros(250), Duration::from_micros(1500))),
        },
        fallbacks: &[],
        pins: &[],
        pins_held_bytes: 0,
    };
    let info = StaticInfo {
        pid: 42,
        pid_namespace: Some(4_026_531_836),
        pid_started: Some(7),
        mountpoint: Path::new("/ctl"),
        follows,
        started: at(90),
        stale_after: STALE,
    };
    let text = render_json(progress, &counters, &info, at(102));
    assert_eq!(text.last(), Some(&b'\n'));
    serde_json::from_slice(&text).unwrap()
}

#[test]
fn the_file_says_all_of_it() {
    let mut progress = good();
    progress.problem = problem(ProblemKind::Statement);
    progress.origin_last = Some(Seq::new(15));
    progress.late = vec![Seq::new(4)];
    let status = rendered(
        &progress,
        Follows::Origin {
            origin: "mysql://db:3306/ctl",
            poll_interval: Duration::from_secs(1),
        },
    );
    for (pointer, value) in [
        ("/pid", json!(42)),
        ("/pid_namespace", json!(4_026_531_836_u64)),
        ("/pid_started", json!(7)),
        ("/mode", json!("origin")),
        ("/origin", json!("mysql://db:3306/ctl")),
        ("/ldb", Json::Null),
        ("/health", json!("error")),
        ("/seq", json!(10)),
        ("/behind", json!(5)),
        ("/ledger_time", json!("1970-01-12T13:46:43.000000Z")),
        ("/seconds_since_contact", json!(2)),
        ("/problem/kind", json!("statement")),
        ("/problem/seq", json!(7)),
        ("/late", json!([4])),
        ("/requests/total", json!(5)),
        ("/requests/lookup", json!(3)),
        ("/counts/tables", json!(2)),
        ("/cache/nodes", json!(4)),
        ("/announce/on", json!(true)),
        ("/announce/failed", json!(1)),
        ("/announce/p50_ms", json!(0.25)),
        ("/poll_interval", json!("1s")),
    ] {
        assert_eq!(status.pointer(pointer), Some(&value), "{pointer}");
    }
}

#[test]
fn someone_elses_ldb_is_healthy_while_it_can_be_read() {
    let render = |unreadable| {
        rendered(
            &Progress::default(),
            Follows::Ldb {
                file: Path::new("/ldb.db"),
                check_interval: Duration::from_millis(250),
                unreadable,
            },
        )
    };
    let status = render(None);
    assert_eq!(status["health"], "ok");
    assert_eq!(
        (&status["origin"], &status["ldb"]),
        (&Json::Null, &json!("/ldb.db"))
    );
    assert_eq!(status["check_interval"], "250ms");
    assert_eq!(status["behind"], Json::Null);
    let status = render(Some("permission denied"));
    assert_eq!(status["health"], "error");
    assert_eq!(status["problem"]["reason"], "permission denied");
}

#[test]
fn times_that_cannot_be_shown_are_left_out() {
    let mut progress = good();
    progress.applied_time = Some(LedgerTime::from_micros(-1));
    let follows = Follows::Origin {
        origin: "x",
        poll_interval: STALE,
    };
    assert_eq!(rendered(&progress, follows)["ledger_time"], Json::Null);
}
