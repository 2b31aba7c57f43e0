//! `ctlfs delete`: removes one row.

use clap::Args;

use super::Error;
use super::origin::{OriginArgs, say};
use super::put::{describe, explain, open, values};
use super::wait::WaitOptions;
use crate::executive::Mutation;

/// Remove one row
///
/// All key fields must be given, and nothing else. A row that is not there is an error, and nothing
/// is written.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct DeleteArgs {
    #[command(flatten)]
    origin: OriginArgs,
    #[command(flatten)]
    wait: WaitOptions,
    /// The table.
    #[arg(value_name = "FAMILY/TABLE")]
    table: String,
    /// The row's key, in the notations of 'ctlfs put'.
    #[arg(value_name = "KEYFIELD=VALUE", required = true)]
    key: Vec<String>,
}

const EXAMPLES: &str = "\
Examples:
  ctlfs delete --origin sqlite:///var/lib/app/ledger.db app/flags name=new-checkout
  ctlfs delete --origin mysql://writer@db:3306/ctldb edge/routes region=eu path=/api
  ctlfs delete --origin mysql://writer@db:3306/ctldb tls/revoked serial=hex:01020304";

/// Runs the command.
pub fn run(args: DeleteArgs) -> Result<(), Error> {
    let waiting = args.wait.prepare()?;
    let (table, mut executive, schema) = open(&args.origin, &args.table)?;
    let key = values(&table, &schema, &args.key)?;
    let row = describe(&table, &schema, &key);
    let outcome = executive
        .mutate(&[Mutation::Delete { table, key }])
        .map_err(explain)?;
    match outcome.seq {
        Some(seq) => {
            say(&format!("{row} deleted at ledger sequence {seq}"));
            waiting.finish(Some(seq), || Ok(None))
        }
        None => Err(Error::failed(format!(
            "there is no row {row}; nothing was written"
        ))),
    }
}
