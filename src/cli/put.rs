//! `ctlfs put`: changes fields of one row; and the notations of values that `delete` shares.

use std::num::{IntErrorKind, ParseIntError};

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use clap::Args;

use super::Error;
use super::origin::{OriginArgs, failed, say};
use super::wait::WaitOptions;
use crate::executive::{Effect, Executive, ExecutiveError, Mutation, expected, unhex};
use crate::hex;
use crate::model::{Field, FieldName, FieldType, TableRef, TableSchema, Value};

/// Change fields of one row, or add the row
///
/// The fields that are named change, the others of the row stay; in a new row they are NULL. All
/// key fields must be given.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct PutArgs {
    #[command(flatten)]
    origin: OriginArgs,
    #[command(flatten)]
    wait: WaitOptions,
    /// The table.
    #[arg(value_name = "FAMILY/TABLE")]
    table: String,
    /// The key and the fields to change, in the notations below.
    #[arg(value_name = "FIELD=VALUE", required = true)]
    values: Vec<String>,
}

const EXAMPLES: &str = r#"Values:
  note=half of the EU      text as it is, to the end of the argument; numbers as 1 or 0.25
  note=                    empty text
  note=@notes/eu.txt       the contents of a file, exactly
  cert=hex:00ff            bytes in hexadecimal
  cert=base64:AP8=         bytes in base64
  note:=null               NULL
  note:="@home"            JSON: for text that begins with '@', 'hex:' or 'base64:'

'hex:' and 'base64:' mean bytes in binary and bytestring fields only; elsewhere they are text.

Examples:
  ctlfs put --origin sqlite:///var/lib/app/ledger.db app/flags name=new-checkout enabled=1
  ctlfs put --origin mysql://writer@db:3306/ctldb tls/certs host=www.example.com cert=@www.pem
  ctlfs put --origin sqlite:///var/lib/app/ledger.db --wait /ctl app/flags name=beta enabled=1"#;

/// Runs the command.
pub fn run(args: PutArgs) -> Result<(), Error> {
    let waiting = args.wait.prepare()?;
    let (table, mut executive, schema) = open(&args.origin, &args.table)?;
    let values = values(&table, &schema, &args.values)?;
    let row = describe(&table, &schema, &values);
    let outcome = executive
        .mutate(&[Mutation::Put {
            table: table.clone(),
            values,
        }])
        .map_err(explain)?;
    match outcome.seq {
        Some(seq) => say(&format!("{row} changed at ledger sequence {seq}")),
        None => say(&format!("{row} is so already; nothing was written")),
    }
    debug_assert_ne!(outcome.effects, [Effect::Missing]);
    waiting.finish(outcome.seq, || args.origin.last_seq())
}

/// The table that the command names, as the origin has it.
pub(super) fn open(
    origin: &OriginArgs,
    table: &str,
) -> Result<(TableRef, Executive, TableSchema), Error> {
    let table: TableRef = table.parse().map_err(Error::usage)?;
    let mut executive = origin.executive()?;
    let schema = executive
        .schema(&table)
        .map_err(failed)?
        .ok_or_else(|| Error::failed(ExecutiveError::NoTable(table.clone())))?;
    Ok((table, executive, schema))
}

/// Mistakes in the arguments are usage errors, the rest are failures.
pub(super) fn explain(error: ExecutiveError) -> Error {
    match error {
        ExecutiveError::UnknownField { .. }
        | ExecutiveError::RepeatedField { .. }
        | ExecutiveError::MissingKey { .. }
        | ExecutiveError::NotAKey { .. }
        | ExecutiveError::BadValue { .. } => Error::usage(error),
        other => failed(other),
    }
}

/// The values that the arguments mean for the table's fields.
pub(super) fn values(
    table: &TableRef,
    schema: &TableSchema,
    arguments: &[String],
) -> Result<Vec<(FieldName, Value)>, Error> {
    arguments
        .iter()
        .map(|argument| {
            let (name, text) = argument.split_once('=').ok_or_else(|| {
                // Not quoted: it may be a value whose name was forgotten.
                Error::usage("an argument has no '='; write FIELD=VALUE")
            })?;
            let (name, json) = match name.strip_suffix(':') {
                Some(name) => (name, true),
                None => (name, false),
            };
            let name: FieldName = name.parse().map_err(Error::usage)?;
            let field = schema
                .index_of(name.as_str())
                .and_then(|i| schema.fields().get(i));
            let Some(field) = field else {
                let fields: Vec<&str> = schema.fields().iter().map(|f| f.name.as_str()).collect();
                return Err(Error::usage(ExecutiveError::UnknownField {
                    table: table.clone(),
                    field: name,
                    fields: fields.join(", "),
                }));
            };
            let value = match text.strip_prefix('@') {
                Some(path) if !json => {
                    let bytes = std::fs::read(path).map_err(|e| {
                        Error::failed(format!(
                            "cannot read the value of field \"{name}\" from {path}: {e}"
                        ))
                    })?;
                    from_file(field.ty, bytes)
                }
                _ if json => from_json(field.ty, text),
                _ => from_text(field.ty, text),
            };
            value
                .map(|v| (name, v))
                .map_err(|reason| bad(table, field, reason))
        })
        .collect()
}

fn bad(table: &TableRef, field: &Field, reason: String) -> Error {
    Error::usage(ExecutiveError::BadValue {
        table: table.clone(),
        field: field.name.clone(),
        reason,
    })
}

fn from_text(ty: FieldType, text: &str) -> Result<Value, String> {
    let wrong = || format!("expected {}, found other text", expected(ty));
    match ty {
        FieldType::String | FieldType::Text => Ok(Value::text(text)),
        FieldType::Integer => text
            .parse()
            .map(Value::Integer)
            .map_err(|e: ParseIntError| match e.kind() {
                IntErrorKind::PosOverflow | IntErrorKind::NegOverflow => {
                    "the number does not fit into 64 bits with a sign".into()
                }
                _ => wrong(),
            }),
        // Not "inf" and "NaN", which Rust reads too.
        FieldType::Decimal if text.bytes().any(|b| b.is_ascii_digit()) => {
            text.parse().map(Value::Real).map_err(|_| wrong())
        }
        FieldType::Decimal => Err(wrong()),
        FieldType::Binary | FieldType::Bytestring => {
            if let Some(digits) = text.strip_prefix("hex:") {
                unhex(digits).map(Value::Blob)
            } else if let Some(encoded) = text.strip_prefix("base64:") {
                BASE64
                    .decode(encoded)
                    .map(Value::Blob)
                    .map_err(|_| "the base64 text is not valid".into())
            } else {
                Ok(Value::Blob(text.into()))
            }
        }
    }
}

fn from_file(ty: FieldType, bytes: Vec<u8>) -> Result<Value, String> {
    match ty {
        FieldType::String | FieldType::Text => Ok(Value::Text(bytes)),
        FieldType::Binary | FieldType::Bytestring => Ok(Value::Blob(bytes)),
        FieldType::Integer | FieldType::Decimal => {
            // Tools that write a number into a file end it with a newline.
            let text = String::from_utf8(bytes)
                .map_err(|_| format!("expected {}, found bytes", expected(ty)))?;
            from_text(ty, text.trim_end_matches('\n'))
        }
    }
}

fn from_json(ty: FieldType, text: &str) -> Result<Value, String> {
    use serde_json::Value as Json;

    let found = |what: &str| Err(format!("expected {}, found {what}", expected(ty)));
    let json: Json = serde_json::from_str(text).map_err(|_| {
        "the text behind ':=' is not JSON; write null, a number, or text in double quotes"
            .to_owned()
    })?;
    match (ty, json) {
        (_, Json::Null) => Ok(Value::Null),
        (FieldType::Integer, Json::Bool(b)) => Ok(Value::Integer(b.into())),
        (FieldType::Integer, Json::Number(n)) => match n.as_i64() {
            Some(i) => Ok(Value::Integer(i)),
            None => found("another number"),
        },
        // Not serde_json's own conversion, which may miss the nearest decimal by a little.
        (FieldType::Decimal, Json::Number(_)) => match text.trim().parse() {
            Ok(d) => Ok(Value::Real(d)),
            Err(_) => found("another number"),
        },
        (FieldType::String | FieldType::Text, Json::String(s)) => Ok(Value::text(s)),
        (FieldType::Binary | FieldType::Bytestring, Json::String(s)) => {
            Ok(Value::Blob(s.into_bytes()))
        }
        (_, Json::String(_)) => found("text"),
        (_, Json::Number(_)) => found("a number"),
        (_, Json::Bool(_)) => found("a boolean"),
        (_, Json::Array(_)) => found("a list"),
        (_, Json::Object(_)) => found("an object"),
    }
}

/// A row for a message: `app/flags "new-checkout"`. Keys are names of files, not secrets.
pub(super) fn describe(
    table: &TableRef,
    schema: &TableSchema,
    values: &[(FieldName, Value)],
) -> String {
    let key: Vec<String> = schema
        .key_fields()
        .filter_map(|field| values.iter().find(|(name, _)| *name == field.name))
        .map(|(_, value)| match value {
            Value::Null => "null".into(),
            Value::Integer(i) => i.to_string(),
            Value::Real(r) => r.to_string(),
            Value::Text(text) => format!("{:?}", String::from_utf8_lossy(text)),
            Value::Blob(bytes) => {
                let mut text = "0x".to_owned();
                hex::push(&mut text, bytes);
                text
            }
        })
        .collect();
    format!("{table} {}", key.join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(ty: FieldType, argument: &str) -> Result<Value, String> {
        let field = |name: &str, ty| Field {
            name: name.parse().unwrap(),
            ty,
        };
        let schema = TableSchema::new(
            vec![field("k", FieldType::Integer), field("f", ty)],
            &["k".parse().unwrap()],
        )
        .unwrap();
        values(&"app/t1a".parse().unwrap(), &schema, &[argument.to_owned()])
            .map(|mut values| values.remove(0).1)
            .map_err(|e| e.to_string())
    }

    #[test]
    fn notations_mean_what_the_help_says() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), b"7\n").unwrap();
        let from_file = format!("f=@{}", file.path().display());
        for (ty, argument, value) in [
            (
                FieldType::Text,
                "f=half of = the EU",
                Value::text("half of = the EU"),
            ),
            (FieldType::Text, "f=", Value::text("")),
            (FieldType::Text, "F=x", Value::text("x")),
            (FieldType::Text, "f=hex:00ff", Value::text("hex:00ff")),
            (FieldType::Text, "f:=null", Value::Null),
            (FieldType::Text, "f:=\"@home\"", Value::text("@home")),
            (FieldType::Text, &from_file, Value::text("7\n")),
            (FieldType::Integer, &from_file, Value::Integer(7)),
            (
                FieldType::Integer,
                "f=-9223372036854775808",
                Value::Integer(i64::MIN),
            ),
            (
                FieldType::Integer,
                "f:=9223372036854775807",
                Value::Integer(i64::MAX),
            ),
            (FieldType::Decimal, "f=0.25", Value::Real(0.25)),
            (FieldType::Decimal, "f=1e-3", Value::Real(0.001)),
            (FieldType::Binary, "f=hex:00fF", Value::Blob(vec![0, 255])),
            (
                FieldType::Binary,
                "f=base64:AP8=",
                Value::Blob(vec![0, 255]),
            ),
            (FieldType::Binary, "f=plain", Value::Blob(b"plain".to_vec())),
            (
                FieldType::Binary,
                "f:=\"hex:00\"",
                Value::Blob(b"hex:00".to_vec()),
            ),
            (FieldType::Binary, &from_file, Value::Blob(b"7\n".to_vec())),
        ] {
            assert_eq!(read(ty, argument), Ok(value), "{ty} {argument}");
        }
    }

    #[test]
    fn json_numbers_are_the_same_decimals_as_plain_ones() {
        for digits in [
            "0.1",
            "1e23",
            "8.41e21",
            "9007199254740993",
            "3.518437208883201171875e13",
            "62.5364939768271845828",
            "2.2250738585072011e-308",
            "5e-324",
        ] {
            let plain = read(FieldType::Decimal, &format!("f={digits}")).unwrap();
            let json = read(FieldType::Decimal, &format!("f:= {digits} ")).unwrap();
            assert_eq!(json, plain, "{digits}");
        }
        // Many digits, on which a reader that rounds twice goes wrong.
        for n in 0..2000 {
            let digits = format!("0.{n}{}", 7_046_029_254_386_353_131_u64 - n);
            let plain = read(FieldType::Decimal, &format!("f={digits}")).unwrap();
            let json = read(FieldType::Decimal, &format!("f:={digits}")).unwrap();
            assert_eq!(json, plain, "{digits}");
        }
    }

    #[test]
    fn mistakes_are_refused_without_the_value() {
        for (ty, argument) in [
            (FieldType::Integer, "f=hunter2"),
            (FieldType::Integer, "f=9223372036854775808"),
            (FieldType::Integer, "f:=1.5"),
            (FieldType::Decimal, "f=NaN"),
            (FieldType::Decimal, "f=inf"),
            (FieldType::Binary, "f=hex:hunter2"),
            (FieldType::Binary, "f=hex:000"),
            (FieldType::Binary, "f=base64:hunter2!"),
            (FieldType::Text, "f:=hunter2"),
            (FieldType::Text, "f:=[\"hunter2\"]"),
            (FieldType::Text, "g=hunter2"),
            (FieldType::Text, "hunter2"),
            (FieldType::Text, "f=@/no/such/file"),
        ] {
            let error = read(ty, argument).unwrap_err();
            assert!(!error.contains("hunter2"), "{error}");
        }
    }
}
