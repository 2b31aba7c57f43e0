//! `ctlfs apply`: loads families, tables and rows from a YAML or JSON file.

use std::io::{IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::{Args, ValueHint};

use super::Error;
use super::origin::{OriginArgs, failed, say};
use super::wait::WaitOptions;
use crate::executive::{self, Applied, ApplyError, Document};

/// Load families, tables and rows from a YAML or JSON file
///
/// Creates the families, tables and fields that are missing and makes every row what the file
/// says; fields that a row of the file does not name become NULL. Rows and tables that the file
/// does not name stay. The file is checked before anything is changed, and what is already so is
/// not written again. A table lists a key once.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct ApplyArgs {
    #[command(flatten)]
    origin: OriginArgs,
    #[command(flatten)]
    wait: WaitOptions,
    /// The file, or '-' for standard input.
    #[arg(short, long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    file: PathBuf,
}

const EXAMPLES: &str = r#"The file:
  families:
    app:
      tables:
        flags:
          fields: {name: string, enabled: integer, rollout: decimal, note: text, icon: binary}
          key: [name]
          rows:
            - {name: new-checkout, enabled: 1, rollout: 0.25, note: "half of the EU"}
            - {name: dark-mode, enabled: 1, note: null, icon: {file: moon.png}}

Types: string (191 characters), integer (64 bits), decimal, text and binary (16 MiB), bytestring
(255 bytes). Keys are string, integer or bytestring. 'fields' and 'key' may be left out for a
table that exists. Bytes are written {hex: "00ff"}, {base64: "AP8="} (or !!binary AP8=), or
{file: PATH}, which starts at the directory of the file and also works for text.

Examples:
  ctlfs apply --origin sqlite:///var/lib/app/ledger.db -f config.yaml
  make-config | ctlfs apply --origin mysql://writer@db:3306/ctldb -f -"#;

/// How long it takes before progress is shown.
const QUIET: Duration = Duration::from_secs(2);
/// The time between two lines of progress.
const INTERVAL: Duration = Duration::from_secs(1);

/// Runs the command.
pub fn run(args: ApplyArgs) -> Result<(), Error> {
    let waiting = args.wait.prepare()?;
    let mut executive = args.origin.executive()?;
    let mut ticker = Ticker::new();
    let document = if args.file.as_os_str() == "-" {
        let mut text = String::new();
        if std::io::stdin().is_terminal() {
            ticker.say("reading the document from the terminal; Ctrl-D ends it");
        }
        std::io::stdin()
            .read_to_string(&mut text)
            .map_err(|e| Error::failed(format!("cannot read standard input: {e}")))?;
        Document::parse("-", Path::new(""), &text)
    } else {
        Document::read(&args.file, &mut |read, of| {
            ticker.tick(|| match of {
                Some(of) => format!("read {} of {} MiB", read >> 20, of >> 20),
                None => format!("read {} MiB", read >> 20),
            });
        })
    }
    .map_err(Error::failed)?;
    let applied = executive::apply(document, &mut executive, &mut |progress| {
        ticker.tick(|| format!("{} of {} rows", progress.rows, progress.of));
    })
    .map_err(|error| match error {
        ApplyError::Document(e) => Error::failed(e),
        ApplyError::Executive(e) => failed(e),
    })?;
    say(&summary(&applied));
    waiting.finish(applied.seq, || args.origin.last_seq())
}

fn summary(applied: &Applied) -> String {
    let Some(seq) = applied.seq else {
        return if applied.families > 0 {
            format!("created {}", count(applied.families, "family", "families"))
        } else {
            format!(
                "nothing to change: {} are as in the file",
                count(applied.unchanged, "row", "rows")
            )
        };
    };
    let mut parts = Vec::new();
    for (n, one, many, verb) in [
        (applied.families, "family", "families", "created"),
        (applied.tables, "table", "tables", "created"),
        (applied.fields, "field", "fields", "added"),
        (applied.written, "row", "rows", "written"),
    ] {
        if n > 0 {
            parts.push(format!("{} {verb}", count(n, one, many)));
        }
    }
    if applied.unchanged > 0 {
        parts.push(format!("{} unchanged", applied.unchanged));
    }
    format!("{}, at ledger sequence {seq}", parts.join(", "))
}

fn count(n: usize, one: &str, many: &str) -> String {
    format!("{n} {}", if n == 1 { one } else { many })
}

/// Progress on standard error: nothing in a short run, then at most a line a second.
struct Ticker {
    next: Instant,
}

impl Ticker {
    fn new() -> Self {
        Ticker {
            next: Instant::now() + QUIET,
        }
    }

    fn tick(&mut self, line: impl FnOnce() -> String) {
        let now = Instant::now();
        if now >= self.next {
            self.next = now + INTERVAL;
            self.say(&line());
        }
    }

    fn say(&self, line: &str) {
        let _ = writeln!(std::io::stderr(), "ctlfs: {line}");
    }
}
