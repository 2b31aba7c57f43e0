//! The names, by example and by property.

use std::collections::HashMap;

use proptest::prelude::*;

use super::*;

const KEY_TYPES: [FieldType; 3] = [FieldType::String, FieldType::Integer, FieldType::Bytestring];

fn name(ty: FieldType, value: Value) -> String {
    String::from_utf8(encode(ty, &value).unwrap()).unwrap()
}

fn assert_is_file_name(name: &[u8]) {
    assert!(!name.is_empty(), "empty name");
    assert!(name.len() <= MAX_NAME, "{} bytes", name.len());
    assert!(!name.starts_with(b"."), "starts with '.'");
    assert!(!name.contains(&b'/') && !name.contains(&0), "'/' or NUL");
}

/// The value's name leads back to the value.
fn assert_round_trip(ty: FieldType, value: &Value) {
    let name = encode(ty, value).unwrap();
    assert_is_file_name(&name);
    match decode(ty, &name) {
        Some(Decoded::Exact(back)) => assert!(back == *value, "{ty}: {value:?} came back changed"),
        Some(Decoded::Hashed {
            prefix,
            text,
            blob,
            digest,
        }) => {
            let raw = value.bytes().unwrap();
            assert!(raw.starts_with(&prefix));
            assert!(!prefix.is_empty());
            assert_eq!(Sha256::digest(raw)[..DIGEST], digest);
            assert!(match value {
                Value::Text(_) => text,
                _ => blob,
            });
            assert!(matches_hashed(ty, value, &name));
        }
        None => panic!("{ty}: {value:?} has the name {name:?}, which decodes to nothing"),
    }
}

#[test]
fn names_by_example() {
    use FieldType::{Bytestring, Decimal, Integer, String};
    let blob = |b: &[u8]| Value::Blob(b.to_vec());
    for (ty, value, expected) in [
        (String, Value::text("new-checkout"), "new-checkout"),
        (String, Value::text(""), "%"),
        (String, Value::text("."), "%2E"),
        (String, Value::text(".."), "%2E."),
        (String, Value::text("a.b"), "a.b"),
        (String, Value::text("a/b%c~d\n\x7f"), "a%2Fb%25c%7Ed%0A%7F"),
        (String, Value::text("größe 🦀"), "größe 🦀"),
        (String, blob(b"a\0b"), "a%00b"),
        (String, Value::text("a\0b"), "a%00b~text"),
        (String, blob(b"ab"), "0x6162~blob"),
        (String, blob(b""), "0x~blob"),
        (String, Value::Integer(5), "5~integer"),
        (Integer, Value::Integer(0), "0"),
        (Integer, Value::Integer(i64::MIN), "-9223372036854775808"),
        (Integer, Value::Integer(i64::MAX), "9223372036854775807"),
        (Integer, Value::text("x"), "x~text"),
        (Integer, Value::text(""), "%~text"),
        (Integer, Value::Real(0.25), "0.25~real"),
        (Integer, Value::Real(-0.0), "-0.0~real"),
        (Integer, Value::Real(5e-324), "5e-324~real"),
        (Integer, Value::Real(f64::INFINITY), "inf~real"),
        (Integer, blob(b"\xff"), "0xff~blob"),
        (Bytestring, blob(b""), "0x"),
        (Bytestring, blob(b"\x01\xab"), "0x01ab"),
        (Bytestring, Value::text("0x01"), "0x01~text"),
        (Decimal, Value::Real(1.5), "1.5"),
    ] {
        assert_eq!(name(ty, value.clone()), expected);
        assert_round_trip(ty, &value);
    }
    assert_eq!(encode(String, &Value::Null), None);
    assert_eq!(encode(Integer, &Value::Real(f64::NAN)), None);
}

#[test]
fn other_spellings_name_nothing() {
    use FieldType::{Bytestring, Integer, String};
    let cut_string = name(String, Value::text("x".repeat(300)));
    let cut_bytes = name(Bytestring, Value::Blob(vec![0xab; 200]));
    let too_short = cut_string.replacen('x', "", 4);
    for (ty, bad) in [
        (Integer, "00"),
        (Integer, "+1"),
        (Integer, "-0"),
        (Integer, "01"),
        (Integer, "1 "),
        (Integer, ""),
        (Integer, "9223372036854775808"),
        (Integer, "0x01"),
        (Integer, "1~integer"),
        (Integer, "1~text~text"),
        (Integer, "nan~real"),
        (Integer, "NaN~real"),
        (Integer, "1~real"),
        (Integer, "+inf~real"),
        (String, ""),
        (String, "."),
        (String, ".."),
        (String, ".a"),
        (String, "a/b"),
        (String, "a\nb"),
        (String, "a\0b"),
        (String, "%2f"),
        (String, "%41"),
        (String, "%2"),
        (String, "a%"),
        (String, "%%"),
        (String, "a%2E"),
        (String, "%C3%A9"),
        (String, "a~b"),
        (String, "a~text"),
        (String, "a%00~blob"),
        (String, "0x610062~blob"),
        (String, "~"),
        (String, "~text"),
        (String, "a~d41d8cd98f00b204e9800998ecf8427e"),
        (Bytestring, "0X01"),
        (Bytestring, "0x0"),
        (Bytestring, "0xAB"),
        (Bytestring, "01"),
        (Bytestring, "0x01~blob"),
        (Bytestring, ""),
        (String, cut_string.to_uppercase().as_str()),
        (String, too_short.as_str()),
        (String, format!("{cut_string}~text~text").as_str()),
        (String, format!("{cut_string}~integer").as_str()),
        (String, format!("{cut_string}0").as_str()),
        (Integer, cut_string.as_str()),
        (Bytestring, cut_string.as_str()),
        (Bytestring, format!("{cut_bytes}~blob").as_str()),
        (Bytestring, cut_bytes.replace("ab", "AB").as_str()),
        (String, "a".repeat(256).as_str()),
    ] {
        assert_eq!(decode(ty, bad.as_bytes()), None, "{ty} {bad:?}");
    }
}

#[test]
fn long_names_are_cut_at_an_encoding_boundary() {
    use FieldType::{Bytestring, Integer, String};
    let cases: Vec<(FieldType, Value, usize)> = vec![
        (String, Value::text("a".repeat(256)), 200),
        (String, Value::text("🦀".repeat(191)), 200),
        (String, Value::text(format!("a{}", "🦀".repeat(190))), 197),
        (String, Value::text(format!("aa{}", "🦀".repeat(189))), 198),
        (String, Value::text(format!("aaa{}", "🦀".repeat(188))), 199),
        (String, Value::text("/".repeat(191)), 198),
        (String, Value::text(format!("a{}", "/".repeat(190))), 199),
        (String, Value::text(format!("aa{}", "/".repeat(189))), 200),
        (String, Value::Text(vec![0x80; 300]), 200),
        (String, Value::Blob(vec![0; 191]), 198),
        (Bytestring, Value::Blob(vec![0xff; 127]), 200),
        (Bytestring, Value::Blob(vec![0; 255]), 200),
        (Bytestring, Value::text("b".repeat(251)), 200),
        (Integer, Value::text("é".repeat(191)), 200),
        (Integer, Value::Blob(vec![1; 4096]), 200),
        (String, Value::Blob(vec![1; 4096]), 200),
    ];
    for (ty, value, body) in cases {
        let name = encode(ty, &value).unwrap();
        assert_eq!(
            name.iter().position(|b| *b == b'~'),
            Some(body),
            "{value:?}"
        );
        assert_round_trip(ty, &value);
        if std::str::from_utf8(value.bytes().unwrap()).is_ok() {
            assert!(
                std::str::from_utf8(&name).is_ok(),
                "{value:?} lost half a character"
            );
        }
    }
    // The longest names that are kept whole.
    for (ty, value) in [
        (String, Value::text("a".repeat(255))),
        (String, Value::text("/".repeat(85))),
        (Bytestring, Value::Blob(vec![0xff; 126])),
        (Integer, Value::text("a".repeat(250))),
    ] {
        let name = encode(ty, &value).unwrap();
        assert_eq!(decode(ty, &name), Some(Decoded::Exact(value)));
    }
    // Known once and for all: a new version of ctlfs must not rename files.
    assert_eq!(
        name(String, Value::text("a".repeat(256))),
        format!("{}~02d7160d77e18c6447be80c2e355c7ed", "a".repeat(200))
    );
}

/// Bytes that names treat specially, and strings made of them.
fn nasty_bytes(longest: usize) -> impl Strategy<Value = Vec<u8>> {
    let piece = prop_oneof![
        prop::sample::select(vec![
            "/", "%", "~", ".", "\0", "\n", "\x7f", "..", "🦀", "é", "a", "%2F", "~text", "0x",
            "\u{80}",
        ])
        .prop_map(|s| s.as_bytes().to_vec()),
        any::<u8>().prop_map(|b| vec![b]),
    ];
    let uniform = (piece.clone(), 0..longest).prop_map(|(p, n)| p.repeat(n));
    let mixed = prop::collection::vec(piece, 0..longest).prop_map(|p| p.concat());
    prop_oneof![
        3 => mixed,
        1 => (any::<bool>(), uniform).prop_map(|(shift, mut u)| {
            if shift {
                u.insert(0, b'a');
            }
            u
        }),
        1 => prop::collection::vec(any::<u8>(), 0..longest),
        1 => any::<String>().prop_map(String::into_bytes),
    ]
}

fn values() -> impl Strategy<Value = Value> {
    prop_oneof![
        nasty_bytes(260).prop_map(Value::Text),
        nasty_bytes(260).prop_map(Value::Blob),
        nasty_bytes(4).prop_map(Value::Text),
        nasty_bytes(4).prop_map(Value::Blob),
        any::<i64>().prop_map(Value::Integer),
        prop::sample::select(vec![i64::MIN, -1, 0, 1, i64::MAX]).prop_map(Value::Integer),
        any::<f64>()
            .prop_filter("NaN is NULL", |f| !f.is_nan())
            .prop_map(Value::Real),
        (-5..5i32).prop_map(|n| Value::Real(f64::from(n))),
        (-5..5i64).prop_map(Value::Integer),
        (-5..5i64).prop_map(|n| Value::text(n.to_string())),
    ]
}

fn names() -> impl Strategy<Value = Vec<u8>> {
    let near = (
        values(),
        prop::sample::select(&FieldType::ALL[..]),
        any::<u16>(),
        any::<u8>(),
    )
        .prop_map(|(value, ty, at, byte)| {
            let mut name = encode(ty, &value).unwrap();
            let at = usize::from(at) % name.len();
            match byte % 4 {
                0 => name[at] = byte,
                1 => name[at] ^= 0x20,
                2 => name.truncate(at),
                _ => {}
            }
            name
        });
    prop_oneof![nasty_bytes(40), near]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn every_value_comes_back(value in values(), ty in prop::sample::select(&FieldType::ALL[..])) {
        assert_round_trip(ty, &value);
    }

    #[test]
    fn every_name_that_decodes_is_the_one_name(name in names(), ty in prop::sample::select(&FieldType::ALL[..])) {
        match decode(ty, &name) {
            Some(Decoded::Exact(value)) => prop_assert_eq!(encode(ty, &value), Some(name)),
            Some(Decoded::Hashed { prefix, text, blob, .. }) => {
                prop_assert!(text || blob);
                prop_assert!(!prefix.is_empty());
            }
            None => {}
        }
    }

    #[test]
    fn different_values_have_different_names(values in prop::collection::vec(values(), 2..60)) {
        for ty in KEY_TYPES {
            let mut seen: HashMap<Vec<u8>, &Value> = HashMap::new();
            for value in &values {
                let name = encode(ty, value).unwrap();
                let other = seen.insert(name, value);
                prop_assert!(other.is_none_or(|o| o == value), "two values of {} share a name", ty);
            }
        }
    }
}

#[test]
fn every_byte_has_a_name_of_its_own() {
    for ty in KEY_TYPES {
        let mut seen = HashMap::new();
        for byte in 0..=255u8 {
            for value in [Value::Text(vec![byte]), Value::Blob(vec![byte])] {
                assert_round_trip(ty, &value);
                assert!(seen.insert(encode(ty, &value).unwrap(), value).is_none());
            }
        }
        let all: Vec<u8> = (0..=255).collect();
        assert_round_trip(ty, &Value::Blob(all.clone()));
        assert_round_trip(ty, &Value::Text(all));
    }
}
