//! The YAML or JSON file that `ctlfs apply` reads: families, their tables, fields, keys and rows.
//!
//! This file only reads and checks the document's shape, and remembers on which line everything
//! stands; what the values mean for a table is [`super::apply`]'s part. Whole numbers keep all 64
//! bits. Nothing is guessed: plain `yes` is text, and so are numbers with leading zeros or
//! underscores.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_saphyr::{Spanned, Tagged};

/// YAML's own notation for bytes: base64.
const BINARY_TAG: &str = "tag:yaml.org,2002:binary";

/// A document, read but not compared with any origin yet.
#[derive(Debug)]
pub struct Document {
    /// The name under which errors show the document.
    pub(super) name: String,
    /// Where the paths in `{file: …}` start.
    pub(super) directory: PathBuf,
    pub(super) families: Map<FamilyPart>,
}

/// What is wrong with a document: the file, the line, and what stands there.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct DocumentError {
    /// The document's name.
    pub file: String,
    /// The line, from 1, if the mistake has one.
    pub line: Option<u32>,
    /// What is wrong.
    pub message: String,
}

impl fmt::Display for DocumentError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            Some(line) => write!(f, "{}:{line}: {}", self.file, self.message),
            None => write!(f, "{}: {}", self.file, self.message),
        }
    }
}

/// Something with the line on which it stands.
#[derive(Debug, Clone)]
pub(super) struct At<T> {
    pub(super) line: u32,
    pub(super) value: T,
}

/// A mapping in the document's order.
#[derive(Debug)]
pub(super) struct Map<T>(pub(super) Vec<(At<String>, T)>);

impl<T> Default for Map<T> {
    fn default() -> Self {
        Map(Vec::new())
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Top {
    families: Map<FamilyPart>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FamilyPart {
    #[serde(default)]
    pub(super) tables: Map<TablePart>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct TablePart {
    pub(super) fields: Option<Map<At<String>>>,
    pub(super) key: Option<At<Vec<At<String>>>>,
    #[serde(default)]
    pub(super) rows: Vec<At<RowPart>>,
}

/// A row: its fields in the document's order.
pub(super) type RowPart = Map<At<Node>>;

/// A value as the document has it.
#[derive(Clone)]
pub(super) enum Node {
    Null,
    Bool(bool),
    Integer(i64),
    /// A whole number beyond 64 signed bits.
    Huge,
    Decimal(f64),
    Text(String),
    /// A mapping of one entry, `{hex: "00ff"}`: how bytes are written. `!!binary` is one of
    /// `base64`.
    Notation(Box<(String, String)>),
    List,
    Mapping,
}

/// Values are users' data: only their kind is shown.
impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Node::Null => "null",
            Node::Bool(_) => "bool",
            Node::Integer(_) | Node::Huge => "integer",
            Node::Decimal(_) => "decimal",
            Node::Text(_) => "text",
            Node::Notation(_) | Node::Mapping => "mapping",
            Node::List => "list",
        })
    }
}

impl Document {
    /// Reads a file. `progress` is called now and then with the bytes read so far and, if known,
    /// the size of the file.
    pub fn read(
        path: &Path,
        progress: &mut dyn FnMut(u64, Option<u64>),
    ) -> Result<Self, DocumentError> {
        let name = path.display().to_string();
        let error = |message: String| DocumentError {
            file: name.clone(),
            line: None,
            message,
        };
        let file = File::open(path).map_err(|e| error(format!("cannot be opened: {e}")))?;
        let size = file
            .metadata()
            .ok()
            .filter(std::fs::Metadata::is_file)
            .map(|m| m.len());
        let directory = path.parent().unwrap_or(Path::new("")).to_owned();
        let mut text = String::new();
        let mut reader = Counted {
            inner: file,
            read: 0,
            size,
            progress,
        };
        reader
            .read_to_string(&mut text)
            .map_err(|e| error(format!("cannot be read: {e}")))?;
        Document::parse(&name, &directory, &text)
    }

    /// Reads a document from text. `name` is shown in errors; the paths in `{file: …}` start at
    /// `directory`.
    pub fn parse(name: &str, directory: &Path, text: &str) -> Result<Self, DocumentError> {
        let mut options = serde_saphyr::Options::default();
        // The person who runs the command wrote the document; there is nobody to be guarded from,
        // and tables may be long.
        options.budget = None;
        options.emit_comments = false;
        options.strict_booleans = true;
        options.ignore_binary_tag_for_string = true;
        options.leading_zero_numbers_as_strings = true;
        options.underscored_numbers_as_strings = true;
        options.alias_limits.max_total_replayed_events = usize::MAX;
        // A piece of the document in an error would show more values than the wrong one.
        options.with_snippet = false;
        let top: Top =
            serde_saphyr::from_str_with_options(text, options).map_err(|e| DocumentError {
                file: name.to_owned(),
                line: e
                    .location()
                    .and_then(|at| u32::try_from(at.line()).ok())
                    .filter(|line| *line > 0),
                message: message(&e),
            })?;
        Ok(Document {
            name: name.to_owned(),
            directory: directory.to_owned(),
            families: top.families,
        })
    }

    pub(super) fn error(&self, line: u32, message: impl Into<String>) -> DocumentError {
        DocumentError {
            file: self.name.clone(),
            line: (line > 0).then_some(line),
            message: message.into(),
        }
    }
}

/// The parser's message without the place, which stands in front of it already.
fn message(error: &serde_saphyr::Error) -> String {
    let text = error.without_snippet().to_string();
    let text = match text.rfind(" at line ") {
        Some(at) => &text[..at],
        None => &text,
    };
    let text = text.strip_prefix("error: ").unwrap_or(text);
    // The parser's advice is for programs that call it.
    let text = text
        .split_once(", set DuplicateKeyPolicy")
        .map_or(text, |(text, _)| text);
    text.split('\n').next().unwrap_or(text).trim().to_owned()
}

struct Counted<'a> {
    inner: File,
    read: u64,
    size: Option<u64>,
    progress: &'a mut dyn FnMut(u64, Option<u64>),
}

impl Read for Counted<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.read += u64::try_from(n).unwrap_or(0);
        (self.progress)(self.read, self.size);
        Ok(n)
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for At<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let spanned = Spanned::<T>::deserialize(deserializer)?;
        Ok(At {
            line: u32::try_from(spanned.referenced.line()).unwrap_or(0),
            value: spanned.value,
        })
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Map<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries<T>(std::marker::PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for Entries<T> {
            type Value = Map<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a mapping")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Map<T>, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                entries.shrink_to_fit();
                Ok(Map(entries))
            }
        }

        deserializer.deserialize_map(Entries(std::marker::PhantomData))
    }
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let Tagged(Untagged(node), tag) = Tagged::deserialize(deserializer)?;
        Ok(match node {
            Node::Text(text) if tag.as_deref() == Some(BINARY_TAG) => {
                Node::Notation(Box::new(("base64".to_owned(), text)))
            }
            node => node,
        })
    }
}

struct Untagged(Node);

impl<'de> Deserialize<'de> for Untagged {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;

        impl<'de> Visitor<'de> for Any {
            type Value = Node;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a value")
            }

            fn visit_unit<E>(self) -> Result<Node, E> {
                Ok(Node::Null)
            }

            fn visit_none<E>(self) -> Result<Node, E> {
                Ok(Node::Null)
            }

            fn visit_bool<E>(self, value: bool) -> Result<Node, E> {
                Ok(Node::Bool(value))
            }

            fn visit_i64<E>(self, value: i64) -> Result<Node, E> {
                Ok(Node::Integer(value))
            }

            fn visit_u64<E>(self, value: u64) -> Result<Node, E> {
                Ok(i64::try_from(value).map_or(Node::Huge, Node::Integer))
            }

            fn visit_f64<E>(self, value: f64) -> Result<Node, E> {
                Ok(Node::Decimal(value))
            }

            fn visit_str<E>(self, value: &str) -> Result<Node, E> {
                Ok(Node::Text(value.to_owned()))
            }

            fn visit_string<E>(self, value: String) -> Result<Node, E> {
                Ok(Node::Text(value))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Node, A::Error> {
                while seq.next_element::<serde::de::IgnoredAny>()?.is_some() {}
                Ok(Node::List)
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Node, A::Error> {
                let first: Option<(String, Node)> = map.next_entry()?;
                let mut more = false;
                while map
                    .next_entry::<serde::de::IgnoredAny, serde::de::IgnoredAny>()?
                    .is_some()
                {
                    more = true;
                }
                Ok(match first {
                    Some((tag, Node::Text(text))) if !more => Node::Notation(Box::new((tag, text))),
                    // `{hex: 00ff}` and `{hex: 12}` are digits all the same, but which ones stood
                    // there is lost.
                    Some((tag, Node::Integer(_) | Node::Huge | Node::Decimal(_)))
                        if !more && tag == "hex" =>
                    {
                        return Err(A::Error::custom("put the hex digits in quotes"));
                    }
                    _ => Node::Mapping,
                })
            }
        }

        deserializer.deserialize_any(Any).map(Untagged)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Document, DocumentError> {
        Document::parse("f.yaml", Path::new(""), text)
    }

    #[test]
    fn the_designs_example_is_read() {
        let document = parse(
            "families:\n  app:\n    tables:\n      flags:\n        fields: {name: string, \
             enabled: integer, rollout: decimal, note: text}\n        key: [name]\n        \
             rows:\n          - {name: new-checkout, enabled: 1, rollout: 0.25, note: \"half of \
             the EU\"}\n          - name: 007\n            enabled: 9007199254740993\n            \
             note: !!binary AQ+/\n",
        )
        .unwrap();
        let (family, part) = &document.families.0[0];
        assert_eq!((family.value.as_str(), family.line), ("app", 2));
        let (table, part) = &part.tables.0[0];
        assert_eq!((table.value.as_str(), table.line), ("flags", 4));
        let fields = &part.fields.as_ref().unwrap().0;
        assert_eq!(fields.len(), 4);
        assert_eq!(fields[2].1.value, "decimal");
        assert_eq!(part.key.as_ref().unwrap().value[0].value, "name");
        assert_eq!(part.rows[0].line, 8);
        let row = &part.rows[1].value.0;
        assert!(matches!(&row[0].1.value, Node::Text(t) if t == "007"));
        assert!(matches!(
            row[1].1.value,
            Node::Integer(9_007_199_254_740_993)
        ));
        assert_eq!(row[1].1.line, 10);
        assert!(
            matches!(&row[2].1.value, Node::Notation(n) if **n == ("base64".into(), "AQ+/".into()))
        );
    }

    #[test]
    fn mistakes_name_the_line() {
        for (text, line, part) in [
            ("families:\n  app:\n    tabels: {}\n", 3, "tabels"),
            ("families: {}\nfamily: {}\n", 2, "family"),
            ("families:\n  app: {}\n  app: {}\n", 3, "app"),
            ("families:\n  app:\n    tables: [a\n", 3, ""),
            ("families:\n\tapp: {}\n", 2, ""),
            ("{\"families\": {\"app\":\n [1]}}", 2, ""),
        ] {
            let error = parse(text).unwrap_err();
            let at = error.line.unwrap_or(0);
            assert!(at.abs_diff(line) <= 1, "{text:?}: {error}");
            assert!(error.message.contains(part), "{text:?}: {error}");
            assert!(error.to_string().starts_with("f.yaml:"), "{error}");
        }
        assert!(parse("").is_err());
    }
}
