//! Access rules: who may read which family or table. It decides modes and owners; the kernel
//! enforces them. User and group names are looked up by the caller.
//!
//! A rule is `PATTERN=MODE[:OWNER[:GROUP]]`.
//!
//! | pattern | covers |
//! | --- | --- |
//! | `secrets` or `secrets/**` | the family's directory and everything in it |
//! | `app/flags` or `app/flags/**` | the table's directory and everything in it |
//! | `*/limits` | the tables of that name in every family; not the families' directories |
//! | `app/*` | every table of the family; not the family's directory |
//! | `**`, `*` | every family; not `.ctlfs` |
//! | `.ctlfs` or `.ctlfs/**` | the daemon's own files |
//!
//! `*` stands for any characters within one segment. Rules are applied in their order, each setting
//! what it names, as `chmod` and `chown` would: a later rule wins, and one without an owner leaves
//! the owner alone.

use crate::model::{FamilyName, TableRef};

/// The mode of what no rule covers.
pub const DEFAULT_MODE: u16 = 0o444;

/// The directory of the daemon's own files.
const CONTROL: &str = ".ctlfs";

/// Whom something belongs to and who may read it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Access {
    /// The permission bits as the rule gives them; never a write bit, for the tree is read-only.
    pub mode: u16,
    /// The owner.
    pub uid: u32,
    /// The group.
    pub gid: u32,
}

impl Access {
    /// The permission bits of files.
    pub fn file_mode(self) -> u16 {
        self.mode & 0o555
    }

    /// The permission bits of directories: whoever may read may also enter.
    pub fn dir_mode(self) -> u16 {
        let mode = self.file_mode();
        mode | (mode & 0o444) >> 2
    }
}

/// A name that the caller looks up among the users or groups of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Principal<'a> {
    /// A user's name.
    User(&'a str),
    /// A group's name.
    Group(&'a str),
}

/// Why a rule was refused. Every message names the rule.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AccessError {
    /// No `=`.
    #[error("cannot read the access rule {rule:?}: write it as PATTERN=MODE[:OWNER[:GROUP]]")]
    Form {
        /// The rule.
        rule: String,
    },
    /// A pattern that covers nothing.
    #[error("cannot read the access rule {rule:?}: {why}")]
    Pattern {
        /// The rule.
        rule: String,
        /// What is wrong with it and what to write instead.
        why: &'static str,
    },
    /// A mode that is not one.
    #[error(
        "cannot read the access rule {rule:?}: the mode {mode:?} is not an octal number from 0 to \
         0777, such as 0440"
    )]
    Mode {
        /// The rule.
        rule: String,
        /// The mode in it.
        mode: String,
    },
    /// No such user.
    #[error(
        "cannot use the access rule {rule:?}: this host has no user {name:?}; create it or give a \
         numeric id"
    )]
    NoUser {
        /// The rule.
        rule: String,
        /// The user in it.
        name: String,
    },
    /// No such group.
    #[error(
        "cannot use the access rule {rule:?}: this host has no group {name:?}; create it or give \
         a numeric id"
    )]
    NoGroup {
        /// The rule.
        rule: String,
        /// The group in it.
        name: String,
    },
}

/// The rules of one mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AccessRules {
    default: Access,
    rules: Vec<Rule>,
}

impl AccessRules {
    /// No rules: everything is readable by everybody and belongs to `uid` and `gid`.
    pub fn open(uid: u32, gid: u32) -> Self {
        AccessRules {
            default: Access {
                mode: DEFAULT_MODE,
                uid,
                gid,
            },
            rules: Vec::new(),
        }
    }

    /// Reads rules, in their order. What no rule covers belongs to `uid` and `gid`. `resolve` looks
    /// up the names of users and groups; numeric ids do not need it.
    ///
    /// A mode is octal, as in `chmod`. Its write bits are dropped: `0644` means what it says to
    /// readers.
    pub fn parse(
        rules: &[String],
        uid: u32,
        gid: u32,
        resolve: &dyn Fn(Principal<'_>) -> Option<u32>,
    ) -> Result<Self, AccessError> {
        Ok(AccessRules {
            rules: rules
                .iter()
                .map(|rule| Rule::parse(rule, resolve))
                .collect::<Result<_, _>>()?,
            ..AccessRules::open(uid, gid)
        })
    }

    /// What no rule covers, the root of the tree among it.
    pub fn default_access(&self) -> Access {
        self.default
    }

    /// A family's own directory.
    pub fn of_family(&self, family: &FamilyName) -> Access {
        self.apply(|pattern| match pattern {
            Pattern::Family(f) => f.covers(family.as_str()),
            Pattern::Table(..) | Pattern::Control => false,
        })
    }

    /// A table's directory and everything in it.
    pub fn of_table(&self, table: &TableRef) -> Access {
        self.apply(|pattern| match pattern {
            Pattern::Family(f) => f.covers(table.family.as_str()),
            Pattern::Table(f, t) => {
                f.covers(table.family.as_str()) && t.covers(table.table.as_str())
            }
            Pattern::Control => false,
        })
    }

    /// The `.ctlfs` directory and everything in it.
    pub fn of_control(&self) -> Access {
        self.apply(|pattern| matches!(pattern, Pattern::Control))
    }

    fn apply(&self, covers: impl Fn(&Pattern) -> bool) -> Access {
        let mut access = self.default;
        for rule in self.rules.iter().filter(|r| covers(&r.pattern)) {
            access.mode = rule.mode;
            access.uid = rule.uid.unwrap_or(access.uid);
            access.gid = rule.gid.unwrap_or(access.gid);
        }
        access
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Rule {
    pattern: Pattern,
    mode: u16,
    uid: Option<u32>,
    gid: Option<u32>,
}

impl Rule {
    fn parse(
        rule: &str,
        resolve: &dyn Fn(Principal<'_>) -> Option<u32>,
    ) -> Result<Self, AccessError> {
        let form = || AccessError::Form {
            rule: rule.to_owned(),
        };
        let (pattern, rest) = rule.split_once('=').ok_or_else(form)?;
        let pattern = Pattern::parse(pattern).map_err(|why| AccessError::Pattern {
            rule: rule.to_owned(),
            why,
        })?;
        let mut rest = rest.split(':');
        let mode = rest.next().unwrap_or_default();
        let (owner, group) = (rest.next(), rest.next());
        // `0440::app` leaves the owner alone; a colon with nothing after it is a slip.
        if rest.next().is_some() || group == Some("") || (owner == Some("") && group.is_none()) {
            return Err(form());
        }
        let uid = match owner {
            None | Some("") => None,
            Some(name) => Some(
                id(name)
                    .or_else(|| resolve(Principal::User(name)))
                    .ok_or_else(|| AccessError::NoUser {
                        rule: rule.to_owned(),
                        name: name.to_owned(),
                    })?,
            ),
        };
        let gid = match group {
            None => None,
            Some(name) => Some(
                id(name)
                    .or_else(|| resolve(Principal::Group(name)))
                    .ok_or_else(|| AccessError::NoGroup {
                        rule: rule.to_owned(),
                        name: name.to_owned(),
                    })?,
            ),
        };
        Ok(Rule {
            pattern,
            mode: read_mode(mode).ok_or_else(|| AccessError::Mode {
                rule: rule.to_owned(),
                mode: mode.to_owned(),
            })?,
            uid,
            gid,
        })
    }
}

/// A numeric user or group id. The last one means "no id" to the kernel.
fn id(text: &str) -> Option<u32> {
    let digits = text.bytes().all(|b| b.is_ascii_digit());
    text.parse().ok().filter(|id| digits && *id != u32::MAX)
}

/// A mode of up to 0777, without its write bits.
fn read_mode(text: &str) -> Option<u16> {
    let octal = !text.is_empty() && text.bytes().all(|b| (b'0'..=b'7').contains(&b));
    let mode = u16::from_str_radix(text, 8).ok()?;
    (octal && mode <= 0o777).then_some(mode & 0o555)
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Pattern {
    Control,
    Family(Glob),
    Table(Glob, Glob),
}

impl Pattern {
    fn parse(pattern: &str) -> Result<Self, &'static str> {
        let mut segments: Vec<&str> = pattern.split('/').collect();
        if pattern.is_empty() {
            return Err("the pattern is empty; write '**' for every family");
        }
        if pattern.starts_with('/') {
            return Err("patterns start at the mount point; leave out the leading '/'");
        }
        if segments.last() == Some(&"**") && segments.len() > 1 {
            segments.pop();
        }
        match segments.as_slice() {
            ["**"] => Ok(Pattern::Family(Glob::parse("*")?)),
            [CONTROL] => Ok(Pattern::Control),
            [CONTROL, ..] => Err("rules cover .ctlfs as a whole; write '.ctlfs/**'"),
            [family] => Ok(Pattern::Family(Glob::parse(family)?)),
            [family, table] => Ok(Pattern::Table(Glob::parse(family)?, Glob::parse(table)?)),
            _ => Err("rules cover families and tables; write FAMILY/** or FAMILY/TABLE"),
        }
    }
}

/// The name of a family or table, with `*` for any characters.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Glob(String);

impl Glob {
    fn parse(segment: &str) -> Result<Self, &'static str> {
        let segment = segment.to_ascii_lowercase();
        if segment.is_empty() {
            return Err("a segment of the pattern is empty; write FAMILY/** or FAMILY/TABLE");
        }
        if segment.contains("**") {
            return Err("'**' can only be the last segment");
        }
        if !segment
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'_' | b'*'))
        {
            return Err(
                "names of families and tables have letters, digits and '_' only, and '*' is the \
                 only wildcard",
            );
        }
        Ok(Glob(segment))
    }

    fn covers(&self, name: &str) -> bool {
        let mut literals = self.0.split('*');
        let first = literals.next().unwrap_or_default();
        let Some(mut rest) = name.strip_prefix(first) else {
            return false;
        };
        let Some(last) = literals.next_back() else {
            return rest.is_empty();
        };
        // The earliest place of each literal leaves the most room for those that follow.
        for literal in literals {
            match rest.split_once(literal) {
                Some((_, after)) => rest = after,
                None => return false,
            }
        }
        rest.ends_with(last)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(rules: &[&str]) -> Result<AccessRules, AccessError> {
        let rules: Vec<String> = rules.iter().map(|r| (*r).to_owned()).collect();
        AccessRules::parse(&rules, 1000, 1000, &|principal| match principal {
            Principal::User("root") => Some(0),
            Principal::Group("app") => Some(50),
            Principal::User("app") => Some(51),
            _ => None,
        })
    }

    fn access(mode: u16, uid: u32, gid: u32) -> Access {
        Access { mode, uid, gid }
    }

    #[test]
    fn rules_cover_what_their_pattern_says() {
        for (pattern, family, table, other_table, control) in [
            ("secrets/**", true, true, false, false),
            ("secrets", true, true, false, false),
            ("secrets/keys", false, true, false, false),
            ("secrets/keys/**", false, true, false, false),
            ("Secrets/Keys", false, true, false, false),
            ("*/keys", false, true, true, false),
            ("*/keys/**", false, true, true, false),
            ("secrets/*", false, true, false, false),
            ("sec*ts/k*s", false, true, false, false),
            ("s*c*e*s", true, true, false, false),
            ("*e*e*e*", false, false, false, false),
            ("secret", false, false, false, false),
            ("secretss*", false, false, false, false),
            ("*", true, true, true, false),
            ("**", true, true, true, false),
            ("*/**", true, true, true, false),
            (".ctlfs/**", false, false, false, true),
            (".ctlfs", false, false, false, true),
        ] {
            let rules = parse(&[&format!("{pattern}=0400")]).unwrap();
            let got = [
                rules.of_family(&"secrets".parse().unwrap()),
                rules.of_table(&"secrets/keys".parse().unwrap()),
                rules.of_table(&"other/keys".parse().unwrap()),
                rules.of_control(),
            ];
            let expected = [family, table, other_table, control];
            assert_eq!(got.map(|a| a.mode == 0o400), expected, "{pattern}");
            assert_eq!(rules.default_access(), access(0o444, 1000, 1000));
        }
    }

    #[test]
    fn later_rules_win_and_set_what_they_name() {
        let rules = parse(&[
            "app/**=0440:root:app",
            "app/flags=0644",
            "app/limits=0400:12:13",
            "*/limits=0444::app",
        ])
        .unwrap();
        let table = |t: &str| rules.of_table(&t.parse().unwrap());
        assert_eq!(table("app/keys"), access(0o440, 0, 50));
        assert_eq!(table("app/flags"), access(0o444, 0, 50));
        assert_eq!(table("app/limits"), access(0o444, 12, 50));
        assert_eq!(table("web/limits"), access(0o444, 1000, 50));
        assert_eq!(table("web/other"), access(0o444, 1000, 1000));
        assert_eq!(rules.of_family(&"app".parse().unwrap()).mode, 0o440);
    }

    #[test]
    fn directories_can_be_entered_by_whoever_may_read() {
        for (mode, file, dir) in [
            ("0444", 0o444, 0o555),
            ("0640", 0o440, 0o550),
            ("0777", 0o555, 0o555),
            ("0711", 0o511, 0o511),
            ("400", 0o400, 0o500),
            ("0", 0, 0),
        ] {
            let rules = parse(&[&format!("**={mode}")]).unwrap();
            let access = rules.of_family(&"app".parse().unwrap());
            assert_eq!(
                (access.file_mode(), access.dir_mode()),
                (file, dir),
                "{mode}"
            );
        }
    }

    #[test]
    fn refused_rules_say_why() {
        for (rule, part) in [
            ("secrets", "PATTERN=MODE"),
            ("a=0440:root:app:x", "PATTERN=MODE"),
            ("a=0440:", "PATTERN=MODE"),
            ("a=0440:root:", "PATTERN=MODE"),
            ("=0440", "empty"),
            ("/secrets=0440", "leading '/'"),
            ("a/b/c=0440", "families and tables"),
            ("a/b/c/**=0440", "families and tables"),
            ("a//**=0440", "empty"),
            ("a/=0440", "empty"),
            ("a**/b=0440", "'**' can only be the last"),
            ("**/b=0440", "'**' can only be the last"),
            ("a-b=0440", "only wildcard"),
            ("a?=0440", "only wildcard"),
            (".ctlfs/seq=0440", ".ctlfs as a whole"),
            ("a=", "octal"),
            ("a=r", "octal"),
            ("a=0888", "octal"),
            ("a=1777", "octal"),
            ("a=+444", "octal"),
            ("a=0440:nobody-here", "no user \"nobody-here\""),
            ("a=0440:root:nothing", "no group \"nothing\""),
            ("a=0440:4294967295", "no user"),
        ] {
            let error = parse(&[rule]).unwrap_err().to_string();
            assert!(error.contains(part), "{rule}: {error}");
            assert!(error.contains(&format!("{rule:?}")), "{error}");
        }
    }
}
