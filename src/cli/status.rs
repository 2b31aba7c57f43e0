//! `ctlfs status`: shows `.ctlfs/status.json` to people, and its health as an exit status.

use std::io::{self, Write};
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueHint};
use serde_json::Value as Json;

use super::Error;
use super::wait::mounted;
use crate::daemon;

const DEADLINE: Duration = Duration::from_secs(5);

/// Show how a mount is doing.
///
/// The exit status is 0 when the tree is healthy, 1 when it is starting, behind, stale (no contact
/// with the origin for longer than --stale-after of the mount) or has a problem, and 2 when ctlfs is
/// not mounted there, or its daemon is dead. --json prints the file .ctlfs/status.json, which any
/// program can read as well.
#[derive(Args)]
#[command(verbatim_doc_comment)]
#[command(after_help = "Examples:\n  ctlfs status /ctl\n  ctlfs status --json /ctl | jq .behind")]
pub struct StatusArgs {
    /// Where ctlfs is mounted.
    #[arg(value_name = "MOUNTPOINT", value_hint = ValueHint::DirPath)]
    mountpoint: PathBuf,
    /// Print the whole of it as JSON.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(args: StatusArgs) -> Result<(), Error> {
    let path = mounted(&args.mountpoint, "show the status of")?;
    let text = daemon::read_status(&path, DEADLINE).map_err(|error| {
        Error::failed(format!(
            "cannot read the status of {}: {error}",
            path.display()
        ))
    })?;
    let status: Json = serde_json::from_slice(&text).map_err(|error| {
        Error::failed(format!(
            "cannot read the status of {}: {error}",
            path.display()
        ))
    })?;
    let shown = if args.json {
        text
    } else {
        for_people(&status).into_bytes()
    };
    io::stdout().write_all(&shown).map_err(Error::failed)?;
    if status.get("health").and_then(Json::as_str) == Some("ok") {
        Ok(())
    } else {
        Err(Error::Exit(1))
    }
}

/// A few aligned lines.
fn for_people(status: &Json) -> String {
    let text = |name: &str| match status.pointer(name) {
        None | Some(Json::Null) => None,
        Some(Json::String(text)) => Some(text.clone()),
        Some(other) => Some(other.to_string()),
    };
    let or = |name: &str, other: &str| text(name).unwrap_or_else(|| other.to_owned());

    let mut lines = vec![
        ("health", or("/health", "unknown")),
        (
            "mounted",
            format!(
                "{} by pid {} since {}",
                or("/mountpoint", "?"),
                or("/pid", "?"),
                or("/started", "?")
            ),
        ),
    ];
    if let Some(ldb) = text("/ldb") {
        lines.push(("ldb", ldb));
        lines.push(("sequence", or("/seq", "?")));
    } else {
        lines.push(("origin", or("/origin", "?")));
        let behind = match text("/behind").as_deref() {
            None => "the origin's is not known".into(),
            Some("0") => "up to date".into(),
            Some(n) => format!("{n} behind the origin's {}", or("/origin_seq", "?")),
        };
        lines.push(("sequence", format!("{}, {behind}", or("/seq", "?"))));
        lines.push(("push", pushed(status)));
        if let Some(delay) = delay(status) {
            lines.push(("delay", delay));
        }
        lines.push((
            "contact",
            text("/seconds_since_contact")
                .map_or_else(|| "none yet".into(), |seconds| format!("{seconds} s ago")),
        ));
    }
    if let Some(time) = text("/ledger_time") {
        lines.push(("last change", time));
    }
    lines.push((
        "tree",
        format!(
            "{} families, {} tables",
            or("/counts/families", "?"),
            or("/counts/tables", "?")
        ),
    ));
    if let Some(reason) = text("/problem/reason") {
        let entry = text("/problem/seq").map(|seq| format!("entry {seq}"));
        let statement = text("/problem/statement");
        let about: Vec<String> = entry.into_iter().chain(statement).collect();
        let about = if about.is_empty() {
            String::new()
        } else {
            format!("{}: ", about.join(", "))
        };
        lines.push(("problem", format!("{about}{reason}")));
        if let Some(since) = text("/problem/since") {
            lines.push(("since", since));
        }
    }
    let late = status.get("late").and_then(Json::as_array);
    if let Some(late) = late.filter(|late| !late.is_empty()) {
        let seqs: Vec<String> = late.iter().map(Json::to_string).collect();
        lines.push((
            "late",
            format!(
                "never applied, for they appeared too late: {}",
                seqs.join(", ")
            ),
        ));
    }
    for fallback in status
        .get("fallbacks")
        .and_then(Json::as_array)
        .into_iter()
        .flatten()
    {
        lines.push(("kernel", fallback.as_str().unwrap_or_default().to_owned()));
    }
    lines
        .into_iter()
        .map(|(name, value)| format!("{name:<12} {value}\n"))
        .collect()
}

/// Whether changes are pushed, and what happens if not.
fn pushed(status: &Json) -> String {
    let text = |name: &str| status.pointer(name).and_then(Json::as_str);
    let polling = format!("polling every {}", text("/poll_interval").unwrap_or("?"));
    let reason = text("/push/reason");
    match (text("/push/state"), reason) {
        (Some("on"), None) => "on".into(),
        (Some("on"), Some(reason)) => format!("on, but {polling} besides: {reason}"),
        (state, reason) => {
            let state = state.unwrap_or("off");
            let reason = reason.map_or_else(String::new, |reason| format!(": {reason}"));
            format!("{state}, {polling}{reason}")
        }
    }
}

/// How long changes take, as far as the ledger's clock tells.
fn delay(status: &Json) -> Option<String> {
    let number = |name: &str| status.pointer(name).and_then(Json::as_f64);
    let resolution = number("/delay/resolution_ms")?;
    let show = |millis: f64| {
        if resolution >= 1000.0 && millis < resolution {
            "below a second".to_owned()
        } else {
            format!("{millis:.1} ms")
        }
    };
    Some(format!(
        "p50 {}, p99 {}, of the last {} transactions",
        show(number("/delay/p50_ms")?),
        show(number("/delay/p99_ms")?),
        number("/delay/count")?
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn people_get_aligned_lines() {
        let shown = for_people(&json!({
            "health": "error", "pid": 7, "mountpoint": "/ctl", "started": "T", "origin": "sqlite:///x",
            "push": {"state": "off", "reason": "no privilege"}, "poll_interval": "1s",
            "delay": {"count": 7, "p50_ms": 1.234, "p99_ms": 3.0, "resolution_ms": 0.001},
            "ldb": null, "seq": 5, "origin_seq": 9, "behind": 4, "seconds_since_contact": 2,
            "counts": {"families": 1, "tables": 2}, "late": [3],
            "problem": {"kind": "statement", "seq": 6, "statement": "DROP", "reason": "no", "since": "S"},
        }));
        assert_eq!(
            shown,
            "health       error\n\
             mounted      /ctl by pid 7 since T\n\
             origin       sqlite:///x\n\
             sequence     5, 4 behind the origin's 9\n\
             push         off, polling every 1s: no privilege\n\
             delay        p50 1.2 ms, p99 3.0 ms, of the last 7 transactions\n\
             contact      2 s ago\n\
             tree         1 families, 2 tables\n\
             problem      entry 6, DROP: no\n\
             since        S\n\
             late         never applied, for they appeared too late: 3\n"
        );
    }
}
