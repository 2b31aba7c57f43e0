//! The texts of row changes exactly as ctlstore writes them, taken apart into a text with
//! parameters, which needs to be compiled once only, and their values. Pure.
//!
//! What is not such a text to the letter is left to SQLite's own parser: to say no here costs time
//! and nothing else. To say yes is a promise that the parametrised text with these values does
//! what the original does.

use std::borrow::Cow;

use rusqlite::ToSql;
use rusqlite::types::{Null, ToSqlOutput, ValueRef};

/// A canonical REPLACE or DELETE. It holds users' data, so it has no `Debug` outside of tests.
#[cfg_attr(test, derive(Debug, PartialEq))]
pub(super) struct Canonical<'a> {
    pub(super) table: &'a str,
    /// The same text with a parameter for each value.
    pub(super) sql: String,
    pub(super) values: Vec<Literal<'a>>,
}

/// A value as the statement spells it.
#[cfg_attr(test, derive(Debug, PartialEq))]
pub(super) enum Literal<'a> {
    Null,
    Integer(i64),
    Text(Cow<'a, str>),
    Blob(Vec<u8>),
}

impl ToSql for Literal<'_> {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(match self {
            Literal::Null => Null.into(),
            Literal::Integer(i) => (*i).into(),
            Literal::Text(text) => ToSqlOutput::Borrowed(ValueRef::Text(text.as_bytes())),
            Literal::Blob(bytes) => ToSqlOutput::Borrowed(ValueRef::Blob(bytes)),
        })
    }
}

/// Takes `REPLACE INTO fam___tbl ("a","b") VALUES('x',1)` or
/// `DELETE FROM fam___tbl WHERE "k1" = 'x' AND "k2" = x'0102'` apart.
pub(super) fn parse(text: &str) -> Option<Canonical<'_>> {
    let mut parser = Parser {
        rest: text,
        sql: String::with_capacity(128),
        values: Vec::with_capacity(8),
    };
    let table = if parser.take("REPLACE INTO ") {
        parser.replace()?
    } else {
        parser.delete()?
    };
    parser.rest.is_empty().then_some(Canonical {
        table,
        sql: parser.sql,
        values: parser.values,
    })
}

struct Parser<'a> {
    rest: &'a str,
    sql: String,
    values: Vec<Literal<'a>>,
}

impl<'a> Parser<'a> {
    fn replace(&mut self) -> Option<&'a str> {
        let table = self.name()?;
        self.expect(" (")?;
        let mut columns = 0;
        loop {
            self.column()?;
            columns += 1;
            if !self.take(",") {
                break;
            }
        }
        self.expect(") VALUES(")?;
        loop {
            self.value()?;
            if !self.take(",") {
                break;
            }
        }
        self.expect(")")?;
        (columns == self.values.len()).then_some(table)
    }

    fn delete(&mut self) -> Option<&'a str> {
        self.expect("DELETE FROM ")?;
        let table = self.name()?;
        self.expect(" WHERE ")?;
        loop {
            self.column()?;
            self.expect(" = ")?;
            self.key()?;
            if !self.take(" AND ") {
                return Some(table);
            }
        }
    }

    /// Whether `word` comes next; if so it is copied.
    fn take(&mut self, word: &str) -> bool {
        match self.rest.strip_prefix(word) {
            Some(rest) => {
                self.rest = rest;
                self.sql.push_str(word);
                true
            }
            None => false,
        }
    }

    fn expect(&mut self, word: &str) -> Option<()> {
        self.take(word).then_some(())
    }

    fn name(&mut self) -> Option<&'a str> {
        let letter = |b: &u8| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'_');
        let end = self.rest.bytes().take_while(letter).count();
        let (name, rest) = self.rest.split_at_checked(end)?;
        name.starts_with(|c: char| c.is_ascii_lowercase())
            .then_some(())?;
        self.rest = rest;
        self.sql.push_str(name);
        Some(name)
    }

    fn column(&mut self) -> Option<()> {
        self.expect("\"")?;
        self.name()?;
        self.expect("\"")
    }

    /// One value of a row.
    fn value(&mut self) -> Option<()> {
        // Within VALUES nothing but the booleans can have these names.
        for (word, value) in [("true", 1), ("false", 0)] {
            if let Some(rest) = self.rest.strip_prefix(word) {
                return self.push("?", Literal::Integer(value), rest);
            }
        }
        let digits = number(self.rest.strip_prefix('-').unwrap_or(self.rest));
        if let Some((after, true)) = digits {
            let (decimal, _) = self.rest.split_at_checked(self.rest.len() - after.len())?;
            // SQLite reads the literal and this text by the same code, so to the same bits.
            let literal = Literal::Text(decimal.into());
            return self.push("CAST(? AS REAL)", literal, after);
        }
        self.key()
    }

    /// One value that a column is compared with. A cast there would bring an affinity of its own.
    fn key(&mut self) -> Option<()> {
        if let Some(rest) = self.rest.strip_prefix("NULL") {
            return self.push("?", Literal::Null, rest);
        }
        if let Some(rest) = self.rest.strip_prefix('\'') {
            let (text, rest) = string(rest)?;
            return self.push("?", Literal::Text(text), rest);
        }
        if let Some(rest) = self.rest.strip_prefix("x'") {
            let (hex, rest) = rest.split_once('\'')?;
            return self.push("?", Literal::Blob(crate::hex::bytes(hex.as_bytes())?), rest);
        }
        let (after, false) = number(self.rest.strip_prefix('-').unwrap_or(self.rest))? else {
            return None;
        };
        let (integer, _) = self.rest.split_at_checked(self.rest.len() - after.len())?;
        // Beyond 64 bits it is a real number.
        self.push("?", Literal::Integer(integer.parse().ok()?), after)
    }

    fn push(&mut self, parameter: &str, value: Literal<'a>, rest: &'a str) -> Option<()> {
        self.sql.push_str(parameter);
        self.values.push(value);
        self.rest = rest;
        Some(())
    }
}

/// What follows digits with or without a fraction, and whether there is one.
fn number(text: &str) -> Option<(&str, bool)> {
    let digits = |text: &str| text.bytes().take_while(u8::is_ascii_digit).count();
    let (whole, rest) = text.split_at_checked(digits(text))?;
    if whole.is_empty() {
        return None;
    }
    match rest.strip_prefix('.') {
        None => Some((rest, false)),
        Some(fraction) => {
            let (some, rest) = fraction.split_at_checked(digits(fraction))?;
            (!some.is_empty()).then_some((rest, true))
        }
    }
}

/// The string that begins `text`, behind its first quote, and what follows it.
fn string(text: &str) -> Option<(Cow<'_, str>, &str)> {
    let (first, mut rest) = text.split_once('\'')?;
    let mut string = Cow::Borrowed(first);
    while let Some(more) = rest.strip_prefix('\'') {
        let (part, behind) = more.split_once('\'')?;
        let string = string.to_mut();
        string.push('\'');
        string.push_str(part);
        rest = behind;
    }
    Some((string, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ctlstores_texts_are_taken_apart() {
        let text = "REPLACE INTO app___flags (\"a\",\"b\",\"c\",\"d\",\"e\",\"f\",\"g\") \
                    VALUES('it''s','',-9223372036854775808,-0.25,NULL,x'01Ab',true)";
        let found = parse(text).unwrap();
        assert_eq!(found.table, "app___flags");
        assert_eq!(
            found.sql,
            "REPLACE INTO app___flags (\"a\",\"b\",\"c\",\"d\",\"e\",\"f\",\"g\") \
             VALUES(?,?,?,CAST(? AS REAL),?,?,?)"
        );
        let text = |text: &'static str| Literal::Text(text.into());
        assert_eq!(
            found.values,
            [
                text("it's"),
                text(""),
                Literal::Integer(i64::MIN),
                text("-0.25"),
                Literal::Null,
                Literal::Blob(vec![1, 0xab]),
                Literal::Integer(1)
            ]
        );
        let found = parse("DELETE FROM app___t WHERE \"k\" = 'x' AND \"l\" = 7").unwrap();
        assert_eq!(
            found.sql,
            "DELETE FROM app___t WHERE \"k\" = ? AND \"l\" = ?"
        );
        assert_eq!(found.values, [text("x"), Literal::Integer(7)]);
    }

    #[test]
    fn integers_of_64_bits_are_read() {
        for i in [i64::MIN, -7, 0, i64::MAX] {
            let text = format!("DELETE FROM app___t WHERE \"k\" = {i}");
            assert_eq!(parse(&text).unwrap().values, [Literal::Integer(i)]);
        }
    }

    #[test]
    fn everything_else_is_left_to_sqlite() {
        for value in [
            "9223372036854775808",
            "1e3",
            "1.5e3",
            "1.",
            ".5",
            "0x10",
            "1_000",
            "+1",
            "--1",
            "- 1",
            "X'00'",
            "x'0'",
            "x'0g'",
            "'a",
            "'a'b",
            "null",
            "TRUE",
            "truer",
            "\"b\"",
            "1+1",
            "random()",
            "1 ",
            "",
        ] {
            let text = format!("REPLACE INTO app___t (\"a\") VALUES({value})");
            assert_eq!(parse(&text), None, "{value}");
        }
        for text in [
            "",
            "REPLACE INTO app___t (\"a\",\"b\") VALUES(1)",
            "REPLACE INTO app___t (\"a\") VALUES(1),(2)",
            "REPLACE INTO app___t (\"a\") VALUES(1);",
            "REPLACE INTO app___t (\"a\") VALUES(1) RETURNING 1",
            "REPLACE INTO app___t (a) VALUES(1)",
            "REPLACE INTO app___t (\"A\") VALUES(1)",
            "REPLACE INTO main.app___t (\"a\") VALUES(1)",
            "replace into app___t (\"a\") VALUES(1)",
            "DELETE FROM app___t",
            "DELETE FROM app___t WHERE \"a\" = 1.5",
            "DELETE FROM app___t WHERE \"a\" = true",
            "DELETE FROM app___t WHERE \"a\" = 1 OR \"b\" = 1",
            "DELETE FROM app___t WHERE \"a\" > 1",
        ] {
            assert_eq!(parse(text), None, "{text}");
        }
    }
}
