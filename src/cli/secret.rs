//! Keeping passwords out of sight: out of the process list and out of messages.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// The variable that `--origin` can also come from.
pub const ORIGIN_VARIABLE: &str = "CTLFS_ORIGIN";

/// When an `--origin` among `args` carries a password, starts this program anew in this process
/// with the URL in the environment instead, which `ps` shows to nobody. Returns only if there is
/// nothing to hide, or with the reason why it cannot be hidden.
pub fn hide(args: &[OsString]) -> Result<(), String> {
    let Some((args, url)) = split(args) else {
        return Ok(());
    };
    let start = |program: io::Result<std::path::PathBuf>| -> io::Error {
        let mut command = match program {
            Ok(program) => Command::new(program),
            Err(error) => return error,
        };
        if let Some(name) = args.first() {
            command.arg0(name);
        }
        command
            .args(args.get(1..).unwrap_or_default())
            .env(ORIGIN_VARIABLE, &url)
            .exec()
    };
    let error = start(std::env::current_exe());
    Err(format!(
        "cannot hide the password of --origin from the process list: {error}; use --password-file \
         or {ORIGIN_VARIABLE}"
    ))
}

/// The commands that take an `--origin`: elsewhere it is for clap to refuse, or belongs to a command
/// that is run.
const COMMANDS: [&str; 5] = ["init", "apply", "put", "delete", "mount"];

/// The arguments without `--origin`, and its value, if that carries a password. With `--ldb` both
/// stay, for clap to refuse: an origin in the environment would be ignored in silence.
fn split(args: &[OsString]) -> Option<(Vec<OsString>, OsString)> {
    if !args
        .get(1)
        .is_some_and(|arg| COMMANDS.iter().any(|c| arg == c))
    {
        return None;
    }
    let mut kept = Vec::with_capacity(args.len());
    let mut url = None;
    let mut rest = args.iter();
    while let Some(arg) = rest.next() {
        if arg == "--" {
            kept.push(arg.clone());
            kept.extend(rest.cloned());
            break;
        }
        if arg == "--ldb" || arg.as_bytes().starts_with(b"--ldb=") {
            return None;
        }
        let value = if arg == "--origin" { rest.next() } else { None };
        let joined = arg
            .as_bytes()
            .strip_prefix(b"--origin=")
            .map(OsStr::from_bytes);
        match value.map(OsString::as_os_str).or(joined) {
            // Given twice, it is clap's to refuse.
            Some(_) if url.is_some() => return None,
            Some(value) => url = Some(value.to_owned()),
            None => kept.push(arg.clone()),
        }
    }
    let url = url?;
    // All of it is one URL, blanks in a password included.
    let after = url.to_string_lossy();
    let (_, after) = after.split_once("://")?;
    let (login, _) = after.rsplit_once('@')?;
    login.contains(':').then_some((kept, url))
}

/// The text with `***` for the password of every URL in it.
pub fn redact(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("://") {
        out.push_str(before);
        out.push_str("://");
        // A password that was not encoded may hold anything, so what counts is the last '@' of the
        // word; of all that follows, when the word looks like a login that was cut by a blank.
        let mut end = after.find(char::is_whitespace).unwrap_or(after.len());
        if let Some(word) = after.get(..end)
            && word.contains(':')
            && !word.contains('@')
            && let Some(at) = after.rfind('@')
        {
            end = at + 1;
        }
        let (word, tail) = after.split_at(end);
        match word.rsplit_once('@') {
            Some((login, host)) => {
                let (user, password) = login.split_once(':').unzip();
                out.push_str(user.unwrap_or(login));
                if password.is_some() {
                    out.push_str(":***");
                }
                out.push('@');
                out.push_str(host);
            }
            None => out.push_str(word),
        }
        rest = tail;
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(args: &[&str]) -> Vec<OsString> {
        args.iter().map(OsString::from).collect()
    }

    #[test]
    fn an_origin_with_a_password_leaves_the_arguments() {
        let url = "mysql://me:pw@h/db";
        for given in [
            args(&["ctlfs", "mount", "--origin", url, "/ctl"]),
            args(&["ctlfs", "mount", &format!("--origin={url}"), "/ctl"]),
        ] {
            let (kept, found) = split(&given).unwrap();
            assert_eq!(kept, args(&["ctlfs", "mount", "/ctl"]));
            assert_eq!(found, url);
        }
        // The URL may hold blanks; the login ends at the last '@'.
        let url = "mysql://me:correct horse@h:3306/db";
        let given = args(&["ctlfs", "mount", "--origin", url, "/ctl"]);
        assert_eq!(split(&given).unwrap().1, url);
        assert_eq!(
            redact(&format!("error: '{url}' is odd")),
            "error: 'mysql://me:***@h:3306/db' is odd"
        );
        let plain = "cannot reach mysql://h:3306/db: no route";
        assert_eq!(redact(plain), plain);
    }

    #[test]
    fn nothing_else_is_touched() {
        let url = "mysql://me:pw@h/db";
        for given in [
            // These take no origin, and say so; or the argument is another program's.
            args(&["ctlfs", "dev", "--origin", url, "/ctl"]),
            args(&["ctlfs", "with-snapshot", "/ctl", "tool", "--origin", url]),
            args(&["ctlfs", "mount", "--origin", "mysql://me@h/db", "/ctl"]),
            args(&["ctlfs", "mount", "--origin", "sqlite:///a:b/l.db", "/ctl"]),
            args(&["ctlfs", "mount", "--origin"]),
            args(&[
                "ctlfs",
                "mount",
                "--ldb",
                "f",
                "--origin",
                "mysql://me:pw@h/db",
            ]),
            args(&[
                "ctlfs",
                "mount",
                "--origin",
                "mysql://me:pw@h/db",
                "--ldb=f",
            ]),
            args(&["ctlfs", "put", "--", "--origin", "mysql://me:pw@h/db"]),
            args(&["ctlfs", "put", "a/b", "note=mysql://me:pw@h/db"]),
        ] {
            assert!(split(&given).is_none(), "{given:?}");
        }
    }

    #[test]
    fn messages_show_no_password() {
        for (text, shown) in [
            ("x mysql://a:b@h/d y", "x mysql://a:***@h/d y"),
            ("mysql://a:b@c:d/e@h/d", "mysql://a:***@h/d"),
            ("mysql://a@h:3306/d", "mysql://a@h:3306/d"),
            ("http://h/?a=b", "http://h/?a=b"),
            ("none", "none"),
        ] {
            assert_eq!(redact(text), shown);
        }
    }
}
