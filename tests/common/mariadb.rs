//! A private MariaDB server for tests: one per test binary, in a directory and on a port of its
//! own, gone when the test process is, however it ends. `CTLFS_TEST_MYSQL_URL` (a URL with a user
//! who may create databases) points the tests at any other server instead.
//!
//! Every test gets a database of its own, dropped at its end.
#![allow(dead_code)]

use std::io::Write;
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use mysql_async::prelude::Queryable;
use mysql_async::{Conn, Opts, OptsBuilder, Params, Row};

/// How long the server may take to come up; a busy machine is slow.
const STARTUP: Duration = Duration::from_secs(120);

/// Who may create databases, and where.
struct Server {
    host: String,
    port: u16,
    user: String,
    password: String,
}

/// A database of one test.
pub struct TestDatabase {
    name: String,
}

/// Makes an empty database.
pub fn database() -> TestDatabase {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let name = format!(
        "ctlfs_test_{}_{}",
        std::process::id(),
        NUMBER.fetch_add(1, Ordering::Relaxed)
    );
    // Data tables bring their character set; the database's default is an old server's.
    run(
        None,
        &format!("CREATE DATABASE {name} CHARACTER SET latin1"),
    );
    TestDatabase { name }
}

impl TestDatabase {
    /// The database as `--origin` takes it.
    pub fn url(&self) -> String {
        let server = server();
        format!(
            "mysql://{}:{}@{}:{}/{}",
            encode(&server.user),
            encode(&server.password),
            server.host,
            server.port,
            self.name
        )
    }

    /// The same with another password.
    pub fn url_with_password(&self, password: &str) -> String {
        let server = server();
        format!(
            "mysql://{}:{}@{}:{}/{}",
            encode(&server.user),
            encode(password),
            server.host,
            server.port,
            self.name
        )
    }

    /// The password in [`TestDatabase::url`].
    pub fn password(&self) -> &'static str {
        &server().password
    }

    /// Ends every connection to the database, as a restart of the server does.
    pub fn hang_up(&self) {
        for id in self.query(&format!(
            "SELECT id FROM information_schema.processlist WHERE db = '{}' \
             AND id <> CONNECTION_ID()",
            self.name
        )) {
            if let Some(Some(id)) = id.first() {
                run(None, &format!("KILL {id}"));
            }
        }
    }

    /// The database's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs statements in the protocol's session modes.
    pub fn run(&self, sql: &str) {
        run(Some(&self.name), sql);
    }

    /// A query's rows, every value as text, NULL as `None`.
    pub fn query(&self, sql: &str) -> Vec<Vec<Option<String>>> {
        block_on(async {
            let mut conn = connect(server(), Some(&self.name)).await;
            let rows: Vec<Row> = conn.query(sql).await.unwrap();
            rows.into_iter()
                .map(|row| {
                    row.unwrap()
                        .into_iter()
                        .map(mysql_async::from_value)
                        .collect()
                })
                .collect()
        })
    }

    /// Appends a statement to the ledger by hand, as an operator does.
    pub fn append(&self, statement: &str) {
        block_on(async {
            let mut conn = connect(server(), Some(&self.name)).await;
            conn.exec_drop(
                "INSERT INTO ctlstore_dml_ledger (statement) VALUES (?)",
                Params::Positional(vec![statement.into()]),
            )
            .await
            .unwrap();
        });
    }
}

impl Drop for TestDatabase {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            run(None, &format!("DROP DATABASE IF EXISTS {}", self.name));
        }
    }
}

fn run(database: Option<&str>, sql: &str) {
    // Started, if it must be, outside of any runtime.
    let server = server();
    block_on(async {
        let mut conn = connect(server, database).await;
        conn.query_drop(sql).await.unwrap();
        conn.disconnect().await.unwrap();
    });
}

async fn connect(server: &Server, database: Option<&str>) -> Conn {
    let opts = OptsBuilder::default()
        .ip_or_hostname(server.host.clone())
        .tcp_port(server.port)
        .user(Some(server.user.clone()))
        .pass(Some(server.password.clone()))
        .db_name(database)
        .prefer_socket(false)
        .setup(vec![
            "SET SESSION sql_mode = 'NO_BACKSLASH_ESCAPES,ANSI_QUOTES'",
        ]);
    Conn::new(opts).await.unwrap()
}

fn block_on<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
        .block_on(work)
}

fn encode(text: &str) -> String {
    text.bytes().map(|b| format!("%{b:02x}")).collect()
}

fn server() -> &'static Server {
    static SERVER: OnceLock<Server> = OnceLock::new();
    SERVER.get_or_init(|| match std::env::var("CTLFS_TEST_MYSQL_URL") {
        Ok(url) => {
            let opts = Opts::from_url(&url).expect("CTLFS_TEST_MYSQL_URL is not a mysql:// URL");
            Server {
                host: opts.ip_or_hostname().to_owned(),
                port: opts.tcp_port(),
                user: opts.user().unwrap_or("root").to_owned(),
                password: opts.pass().unwrap_or("").to_owned(),
            }
        }
        Err(_) => start(),
    })
}

fn start() -> Server {
    let directory = tempfile::Builder::new()
        .prefix("ctlfs-test-mariadb-")
        .tempdir()
        .unwrap()
        .keep();
    watch(&directory);
    let data = directory.join("data");
    // What the server is run as; it refuses root unless it is named.
    let user = Command::new("id").arg("-un").output().unwrap().stdout;
    let user = String::from_utf8(user).unwrap().trim().to_owned();
    let install = Command::new("mariadb-install-db")
        .arg("--no-defaults")
        .arg(format!("--datadir={}", data.display()))
        .arg(format!("--user={user}"))
        .args(["--auth-root-authentication-method=normal", "--skip-test-db"])
        .args(["--innodb-log-file-size=8M", "--innodb-buffer-pool-size=32M"])
        .stdin(Stdio::null())
        .output()
        .expect("mariadb-install-db cannot be run: the tests need MariaDB's server");
    assert!(
        install.status.success(),
        "mariadb-install-db failed: {}",
        String::from_utf8_lossy(&install.stderr)
    );
    let password = "p@ss:w/rd'%";
    let init = directory.join("init.sql");
    let mut file = std::fs::File::create(&init).unwrap();
    writeln!(
        file,
        "CREATE USER 'ctlfs'@'127.0.0.1' IDENTIFIED BY '{}';",
        password.replace('\'', "''")
    )
    .unwrap();
    writeln!(file, "GRANT ALL ON *.* TO 'ctlfs'@'127.0.0.1';").unwrap();
    // Another process can take a port between our choice and the server's start.
    for _ in 0..5 {
        if let Some(port) = launch(&directory, &data, &init, &user) {
            return Server {
                host: "127.0.0.1".into(),
                port,
                user: "ctlfs".into(),
                password: password.into(),
            };
        }
    }
    let log = std::fs::read_to_string(directory.join("log")).unwrap_or_default();
    panic!("mariadbd does not start:\n{log}");
}

fn launch(directory: &Path, data: &Path, init: &Path, user: &str) -> Option<u16> {
    let port = TcpListener::bind("127.0.0.1:0")
        .and_then(|l| l.local_addr())
        .unwrap()
        .port();
    let log = std::fs::File::create(directory.join("log")).unwrap();
    let mut command = Command::new(find("mariadbd"));
    command
        .arg("--no-defaults")
        .arg(format!("--datadir={}", data.display()))
        .arg(format!("--socket={}", directory.join("socket").display()))
        .arg(format!("--pid-file={}", directory.join("pid").display()))
        .arg(format!("--init-file={}", init.display()))
        .arg(format!("--port={port}"))
        .arg(format!("--user={user}"))
        .args(["--bind-address=127.0.0.1", "--skip-networking=0"])
        .args(["--skip-name-resolve", "--skip-log-bin"])
        .args([
            "--innodb-flush-log-at-trx-commit=2",
            "--innodb-use-native-aio=0",
        ])
        .args([
            "--innodb-buffer-pool-size=64M",
            "--innodb-log-file-size=32M",
        ])
        .args(["--performance-schema=OFF", "--max-allowed-packet=64M"])
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        // A Ctrl-C at the terminal is for the tests; the server goes when they have gone.
        .process_group(0);
    let mut child = command
        .spawn()
        .expect("mariadbd cannot be run: the tests need MariaDB's server");
    std::fs::write(directory.join("server"), child.id().to_string()).unwrap();
    let deadline = Instant::now() + STARTUP;
    let url = format!("mysql://ctlfs:{}@127.0.0.1:{port}/", encode("p@ss:w/rd'%"));
    while Instant::now() < deadline {
        if child.try_wait().unwrap().is_some() {
            return None;
        }
        let up = block_on(async { Conn::from_url(&url).await.is_ok() });
        if up {
            return Some(port);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let _ = child.kill();
    let _ = child.wait();
    None
}

/// Starts a process that waits for the end of this one, however it comes, and then kills the
/// server and removes its directory. (The kernel's parent-death signal goes by the thread that
/// started the child, and a test's thread ends long before its process.)
fn watch(directory: &Path) {
    // The watcher's standard input ends when this process does; nothing is ever written to it.
    let script = "cat >/dev/null; kill -9 $(cat \"$0/server\"); rm -rf \"$0\"";
    let watcher = Command::new("sh")
        .args(["-c", script])
        .arg(directory)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()
        .unwrap();
    // Kept open until the process ends; other children do not inherit it.
    std::mem::forget(watcher);
}

fn find(program: &str) -> PathBuf {
    // Distributions put servers where an ordinary user's PATH does not look.
    ["/usr/sbin", "/usr/local/sbin", "/usr/libexec", "/usr/bin"]
        .iter()
        .map(|dir| Path::new(dir).join(program))
        .find(|path| path.exists())
        .unwrap_or_else(|| program.into())
}
