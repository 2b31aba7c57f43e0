//! `--origin` URLs: where a ledger is and how to log in there.
//!
//! An [`OriginUrl`] can be shown and logged: neither `Display` nor `Debug` nor any error of this
//! file ever gives the password, or a part of a URL in which a mistyped password could stand.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use mysql_async::{Opts, OptsBuilder, UrlError};

/// An origin, parsed and checked.
#[derive(Clone)]
pub enum OriginUrl {
    /// `mysql://user:password@host:3306/database`; MariaDB too.
    MySql(MySqlUrl),
    /// `sqlite:///path/ledger.db`: the embedded ledger of one machine. The path is absolute and
    /// stands in the URL as it is, without percent encoding.
    Sqlite(PathBuf),
}

/// The login to a MySQL or MariaDB server, with the database that holds the ledger.
#[derive(Clone)]
pub struct MySqlUrl {
    opts: Opts,
    database: String,
}

/// Why a URL was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OriginUrlError {
    /// Neither `mysql://` nor `sqlite://`.
    #[error(
        "the origin is not a URL ctlfs knows; write mysql://user:password@host:3306/database \
         or sqlite:///path/ledger.db"
    )]
    UnknownScheme,
    /// No host, a port that is not a number, or other syntax.
    #[error(
        "the mysql:// origin cannot be read: {0}; write mysql://user:password@host:3306/database, \
         with '@', ':', '/', '#', '?' and '%' of the user and password percent-encoded"
    )]
    Syntax(String),
    /// An option behind the `?` that mysql_async does not know, or a value it does not take.
    #[error("the mysql:// origin cannot be used: {0}")]
    Option(String),
    /// A URL without a database name.
    #[error(
        "the mysql:// origin names no database; write mysql://user:password@host:3306/database"
    )]
    NoDatabase,
    /// More than one path segment.
    #[error("the mysql:// origin has a '/' behind its database name; remove what follows it")]
    TrailingPath,
    /// A relative or empty path.
    #[error(
        "the sqlite:// origin needs an absolute path, with three slashes: sqlite:///path/ledger.db"
    )]
    RelativePath,
    /// A password file for an origin that has no login.
    #[error("a password file goes with a mysql:// origin only")]
    PasswordUnused,
    /// The password file cannot be read.
    #[error("cannot read the password file {path}: {reason}", path = path.display())]
    PasswordFile {
        /// The file.
        path: PathBuf,
        /// What the system said.
        reason: String,
    },
}

impl OriginUrl {
    /// The URL of an embedded ledger. A relative path is taken from the working directory.
    pub fn sqlite(path: &Path) -> std::io::Result<Self> {
        Ok(OriginUrl::Sqlite(std::path::absolute(path)?))
    }

    /// The same origin with the password that stands in a file. One newline at the file's end is
    /// not part of the password.
    pub fn with_password_file(self, path: &Path) -> Result<Self, OriginUrlError> {
        let OriginUrl::MySql(url) = self else {
            return Err(OriginUrlError::PasswordUnused);
        };
        let error = |reason: String| OriginUrlError::PasswordFile {
            path: path.to_owned(),
            reason,
        };
        let mut password = std::fs::read(path).map_err(|e| error(e.to_string()))?;
        if password.last() == Some(&b'\n') {
            password.pop();
            if password.last() == Some(&b'\r') {
                password.pop();
            }
        }
        let password =
            String::from_utf8(password).map_err(|_| error("it is not UTF-8 text".into()))?;
        let opts = OptsBuilder::from_opts(url.opts).pass(Some(password)).into();
        Ok(OriginUrl::MySql(MySqlUrl {
            opts,
            database: url.database,
        }))
    }
}

impl MySqlUrl {
    /// How to connect.
    pub(crate) fn opts(&self) -> &Opts {
        &self.opts
    }

    /// The database that holds the ledger.
    pub(crate) fn database(&self) -> &str {
        &self.database
    }
}

impl FromStr for OriginUrl {
    type Err = OriginUrlError;

    fn from_str(url: &str) -> Result<Self, OriginUrlError> {
        if let Some(path) = url.strip_prefix("sqlite://") {
            if !path.starts_with('/') || path.ends_with('/') {
                return Err(OriginUrlError::RelativePath);
            }
            return Ok(OriginUrl::Sqlite(path.into()));
        }
        if !url.starts_with("mysql://") {
            return Err(OriginUrlError::UnknownScheme);
        }
        let opts = Opts::from_url(url).map_err(explain)?;
        let database = match opts.db_name() {
            None | Some("") => return Err(OriginUrlError::NoDatabase),
            Some(name) => name.to_owned(),
        };
        let path = url["mysql://".len()..]
            .split(['?', '#'])
            .next()
            .and_then(|rest| rest.split_once('/'));
        if path.is_some_and(|(_, path)| path.contains('/')) {
            return Err(OriginUrlError::TrailingPath);
        }
        // A host instead of the URL, so that names are looked up without blocking the runtime; an
        // IPv6 address stands in brackets in URLs only.
        let host = opts.ip_or_hostname();
        let host = host
            .strip_prefix('[')
            .and_then(|h| h.strip_suffix(']'))
            .unwrap_or(host)
            .to_owned();
        let socket = opts.socket().is_some();
        let opts = OptsBuilder::from_opts(opts)
            .ip_or_hostname(host)
            // mysql_async would leave a loopback address for the socket the server names, which
            // is somebody else's when the port is forwarded.
            .prefer_socket(socket);
        Ok(OriginUrl::MySql(MySqlUrl {
            opts: opts.into(),
            database,
        }))
    }
}

/// Says what is wrong without quoting more than the name of an option that exists: in a URL that
/// was cut in the wrong place, any other part may hold the password.
fn explain(error: UrlError) -> OriginUrlError {
    match error {
        UrlError::UnknownParameter { .. } => {
            OriginUrlError::Option("there is an unknown option behind the '?'".into())
        }
        UrlError::InvalidParamValue { param, .. } => {
            OriginUrlError::Option(format!("option '{param}' has an invalid value"))
        }
        UrlError::FeatureRequired { param, .. } => {
            OriginUrlError::Option(format!("option '{param}' is not built in"))
        }
        UrlError::InvalidPoolConstraints { .. } => {
            OriginUrlError::Option("pool_min is above pool_max".into())
        }
        UrlError::Parse(why) => OriginUrlError::Syntax(why.to_string()),
        UrlError::Invalid | UrlError::UnsupportedScheme { .. } => {
            OriginUrlError::Syntax("it names no host".into())
        }
    }
}

impl fmt::Display for MySqlUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let clean = |text: &str| -> String {
            text.chars()
                .map(|c| if c.is_control() { '?' } else { c })
                .collect()
        };
        f.write_str("mysql://")?;
        if let Some(user) = self.opts.user() {
            f.write_str(&clean(user))?;
        }
        if self.opts.pass().is_some() {
            f.write_str(":***")?;
        }
        if self.opts.user().is_some() || self.opts.pass().is_some() {
            f.write_str("@")?;
        }
        let host = self.opts.ip_or_hostname();
        if host.contains(':') {
            write!(f, "[{host}]")?;
        } else {
            f.write_str(host)?;
        }
        write!(f, ":{}/{}", self.opts.tcp_port(), clean(&self.database))
    }
}

impl fmt::Display for OriginUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            OriginUrl::MySql(url) => url.fmt(f),
            OriginUrl::Sqlite(path) => write!(f, "sqlite://{}", path.display()),
        }
    }
}

impl fmt::Debug for OriginUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Debug for MySqlUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn shown(url: &str) -> String {
        url.parse::<OriginUrl>().unwrap().to_string()
    }

    #[test]
    fn urls_are_shown_without_the_password() {
        for (url, shows) in [
            (
                "mysql://me:s%40crt@db.example:3307/ctl",
                "mysql://me:***@db.example:3307/ctl",
            ),
            ("mysql://me@db/ctl", "mysql://me@db:3306/ctl"),
            ("mysql://me:pw@[::1]/ctl", "mysql://me:***@[::1]:3306/ctl"),
            ("sqlite:///var/x y.db", "sqlite:///var/x y.db"),
        ] {
            assert_eq!(shown(url), shows);
            assert_eq!(format!("{:?}", url.parse::<OriginUrl>().unwrap()), shows);
        }
        let OriginUrl::MySql(url) = "mysql://m%3ae:s%40crt@h/ctl".parse().unwrap() else {
            panic!("not mysql");
        };
        assert_eq!(url.opts().user(), Some("m:e"));
        assert_eq!(url.opts().pass(), Some("s@crt"));
    }

    #[test]
    fn wrong_urls_are_refused_without_the_password() {
        for url in [
            "",
            "/var/ledger.db",
            "me:hunter2@host/db",
            "postgres://me:hunter2@host/db",
            "mysql:me:hunter2@host/db",
            "mysql://me:hunter2@host",
            "mysql://me:hunter2@host/",
            "mysql://me:hunter2@host/db/more",
            "mysql://me:hunter2@host:port/db",
            "mysql://me:hunter2/x@host/db",
            "mysql://me:1?hunter2@host/db",
            "mysql://me:1/db?hunter2=x@host/db",
            "mysql://me:1/db?require_ssl=hunter2@host/db",
            "mysql:///db",
            "sqlite://ledger.db",
            "sqlite://",
            "sqlite:///",
        ] {
            let error = url.parse::<OriginUrl>().unwrap_err();
            for text in [error.to_string(), format!("{error:?}")] {
                assert!(!text.contains("hunter2"), "{url}: {text}");
            }
        }
    }

    #[test]
    fn a_password_file_replaces_the_password() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(b"a b\n\n").unwrap();
        let url: OriginUrl = "mysql://me:old@h/ctl".parse().unwrap();
        let OriginUrl::MySql(url) = url.with_password_file(file.path()).unwrap() else {
            panic!("not mysql");
        };
        assert_eq!(url.opts().pass(), Some("a b\n"));
        assert_eq!(url.opts().ip_or_hostname(), "h");
        let sqlite: OriginUrl = "sqlite:///x/l.db".parse().unwrap();
        assert!(sqlite.with_password_file(file.path()).is_err());
    }
}
