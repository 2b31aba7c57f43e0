//! Names of families, tables and fields, parsed once into types that prove them valid.
//!
//! The rules are ctlstore's (`pkg/schema`): lower-cased, `^[a-z][a-z0-9_]*$`; families 3–30 and
//! tables 3–50 characters without `__`, fields 1–64 characters.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// Why a name was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("invalid {what} name {name:?}: {why}")]
pub struct NameError {
    what: &'static str,
    name: String,
    why: String,
}

fn parse(
    what: &'static str,
    name: &str,
    length: std::ops::RangeInclusive<usize>,
    double_underscore: bool,
) -> Result<Arc<str>, NameError> {
    let error = |why: String| NameError {
        what,
        name: name.to_owned(),
        why,
    };
    let lower = name.to_ascii_lowercase();
    if !length.contains(&lower.len()) {
        return Err(error(format!(
            "it must have {} to {} characters",
            length.start(),
            length.end()
        )));
    }
    if !lower.starts_with(|c: char| c.is_ascii_lowercase()) {
        return Err(error("it must start with a letter".into()));
    }
    if !lower
        .bytes()
        .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
    {
        return Err(error("only letters, digits and '_' are allowed".into()));
    }
    if !double_underscore && lower.contains("__") {
        return Err(error("'__' is not allowed".into()));
    }
    Ok(lower.into())
}

macro_rules! name_type {
    ($(#[$doc:meta])* $name:ident, $what:literal, $length:expr, $double:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(Arc<str>);

        impl $name {
            /// The name as it stands in paths and SQL.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = NameError;

            fn from_str(name: &str) -> Result<Self, NameError> {
                parse($what, name, $length, $double).map(Self)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&*self.0, f)
            }
        }
    };
}

name_type!(
    /// A family: a group of tables that belong to one team or service.
    FamilyName, "family", 3..=30, false
);
name_type!(
    /// A table within a family.
    TableName, "table", 3..=50, false
);
name_type!(
    /// A field of a table.
    FieldName, "field", 1..=64, true
);

/// A table with its family. Shown and parsed as `family/table`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TableRef {
    /// The family.
    pub family: FamilyName,
    /// The table within it.
    pub table: TableName,
}

impl TableRef {
    /// The table's name in both databases: `family___table`.
    pub fn sql_name(&self) -> String {
        format!("{}___{}", self.family, self.table)
    }

    /// Reads a name in the databases' form. `None` for every other table there, and for spellings
    /// that [`TableRef::sql_name`] would not give back.
    pub fn from_sql_name(name: &str) -> Option<Self> {
        // A family may end in '_' but a table starts with a letter, so at most one split is valid.
        name.match_indices("___")
            .chain(name.char_indices().filter_map(|(i, _)| {
                // match_indices skips overlaps: "a____b" is family "a_".
                name.get(i..i + 3).filter(|s| *s == "___").map(|s| (i, s))
            }))
            .find_map(|(i, _)| {
                let table = TableRef {
                    family: name.get(..i)?.parse().ok()?,
                    table: name.get(i + 3..)?.parse().ok()?,
                };
                (table.sql_name() == name).then_some(table)
            })
    }
}

impl FromStr for TableRef {
    type Err = NameError;

    fn from_str(path: &str) -> Result<Self, NameError> {
        let (family, table) = path.split_once('/').ok_or_else(|| NameError {
            what: "table",
            name: path.to_owned(),
            why: "it must be written FAMILY/TABLE".into(),
        })?;
        Ok(TableRef {
            family: family.parse()?,
            table: table.parse()?,
        })
    }
}

impl fmt::Display for TableRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.family, self.table)
    }
}

impl fmt::Debug for TableRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_ctlstores_rules() {
        assert_eq!("Flags".parse::<TableName>().unwrap().as_str(), "flags");
        for bad in ["ab", "1abc", "a__b", "a-b", "été", "", &"a".repeat(31)] {
            assert!(bad.parse::<FamilyName>().is_err(), "{bad:?} was accepted");
        }
        assert!("a__b".parse::<FieldName>().is_ok());
        assert!("a".repeat(50).parse::<TableName>().is_ok());
    }

    #[test]
    fn the_sql_name_reads_back() {
        for (sql, path) in [
            ("app___flags", Some("app/flags")),
            ("app____flags", Some("app_/flags")),
            ("app___flags_", Some("app/flags_")),
            ("app__flags", None),
            ("_ldb_seq", None),
            ("app___Flags", None),
            ("app___a___b", None),
            ("___flags", None),
        ] {
            let got = TableRef::from_sql_name(sql).map(|t| t.to_string());
            assert_eq!(got.as_deref(), path, "{sql}");
        }
    }
}
