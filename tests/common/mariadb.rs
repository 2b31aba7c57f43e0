//! A private MariaDB server for tests: one per test binary, in a directory and on a port of its
//! own, gone when the test process is, however it ends. `CTLFS_TEST_MYSQL_URL` (a URL with a user
//! who may create databases) points the tests at any other server instead.
//!
//! Every test gets a database of its own, dropped at its end.
#![allow(dead_code)]

use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use mysql_async::prelude::Queryable;
use mysql_async::{Conn, Opts, OptsBuilder, Params, Row};

/// How long the server may take to come up; a busy machine is slow.
const STARTUP: Duration = Duration::from_secs(120);

/// Who may create databases, and where.
#[derive(Clone)]
struct Server {
    host: String,
    port: u16,
    user: String,
    password: String,
}

/// A database of one test.
pub struct TestDatabase {
    name: String,
    server: Server,
}

/// Makes an empty database.
pub fn database() -> TestDatabase {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let name = format!(
        "ctlfs_test_{}_{}",
        std::process::id(),
        NUMBER.fetch_add(1, Ordering::Relaxed)
    );
    // Started, if it must be, outside of any runtime.
    database_on(server(), name)
}

fn database_on(server: &Server, name: String) -> TestDatabase {
    // Data tables bring their character set; the database's default is an old server's.
    run(
        server,
        None,
        &format!("CREATE DATABASE {name} CHARACTER SET latin1"),
    );
    TestDatabase {
        name,
        server: server.clone(),
    }
}

impl TestDatabase {
    /// The database as `--origin` takes it.
    pub fn url(&self) -> String {
        self.url_of(&self.server.user, &self.server.password)
    }

    /// The same with another password.
    pub fn url_with_password(&self, password: &str) -> String {
        self.url_of(&self.server.user, password)
    }

    /// The same for another user.
    pub fn url_of(&self, user: &str, password: &str) -> String {
        format!(
            "mysql://{}:{}@{}:{}/{}",
            encode(user),
            encode(password),
            self.server.host,
            self.server.port,
            self.name
        )
    }

    /// The password in [`TestDatabase::url`].
    pub fn password(&self) -> &str {
        &self.server.password
    }

    /// Ends every connection to the database, as a restart of the server does.
    pub fn hang_up(&self) {
        for id in self.query(&format!(
            "SELECT id FROM information_schema.processlist WHERE db = '{}' \
             AND id <> CONNECTION_ID()",
            self.name
        )) {
            let Some(Some(id)) = id.first() else { continue };
            block_on(async {
                let mut conn = connect(&self.server, None).await;
                match conn.query_drop(format!("KILL {id}")).await {
                    // There is none: it has ended by itself.
                    Err(mysql_async::Error::Server(error)) if error.code == 1094 => {}
                    killed => killed.unwrap(),
                }
            });
        }
    }

    /// The database's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs statements in the protocol's session modes.
    pub fn run(&self, sql: &str) {
        run(&self.server, Some(&self.name), sql);
    }

    /// A query's rows, every value as text, NULL as `None`.
    pub fn query(&self, sql: &str) -> Vec<Vec<Option<String>>> {
        block_on(async {
            let mut conn = connect(&self.server, Some(&self.name)).await;
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
            let mut conn = connect(&self.server, Some(&self.name)).await;
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
            let drop = format!("DROP DATABASE IF EXISTS {}", self.name);
            run(&self.server, None, &drop);
        }
    }
}

fn run(server: &Server, database: Option<&str>, sql: &str) {
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
    let end = Instant::now() + Duration::from_secs(30);
    loop {
        match Conn::new(opts.clone()).await {
            // A server under load drops connections that it has not accepted yet.
            Err(mysql_async::Error::Io(_)) if Instant::now() < end => {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            made => return made.unwrap(),
        }
    }
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

/// What the users of our own servers log in with.
const USER: &str = "ctlfs";
const FOLLOWER: &str = "follower";
const PASSWORD: &str = "p@ss:w/rd'%";

fn start() -> Server {
    let directory = tempfile::Builder::new()
        .prefix("ctlfs-test-mariadb-")
        .tempdir()
        .unwrap()
        .keep();
    watch(&directory);
    install(&directory);
    let options = ["--skip-log-bin".to_owned()];
    // Another process can take a port between our choice and the server's start.
    for _ in 0..5 {
        let port = free_port();
        if launch(&directory, &options, port).is_some() {
            return own_server(port);
        }
    }
    does_not_start(&directory);
}

fn own_server(port: u16) -> Server {
    Server {
        host: "127.0.0.1".into(),
        port,
        user: USER.into(),
        password: PASSWORD.into(),
    }
}

fn does_not_start(directory: &Path) -> ! {
    let log = std::fs::read_to_string(directory.join("log")).unwrap_or_default();
    panic!("mariadbd does not start:\n{log}");
}

/// What the server is run as; it refuses root unless it is named.
fn own_user() -> String {
    let user = Command::new("id").arg("-un").output().unwrap().stdout;
    String::from_utf8(user).unwrap().trim().to_owned()
}

/// Makes the files of a new server, and what it runs when it starts.
fn install(directory: &Path) {
    let install = Command::new("mariadb-install-db")
        .arg("--no-defaults")
        .arg(format!("--datadir={}", directory.join("data").display()))
        .arg(format!("--user={}", own_user()))
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
    let user = format!("'{USER}'@'127.0.0.1'");
    let init = format!(
        "CREATE USER IF NOT EXISTS {user} IDENTIFIED BY '{}';\nGRANT ALL ON *.* TO {user} WITH GRANT OPTION;\n",
        PASSWORD.replace('\'', "''")
    );
    std::fs::write(directory.join("init.sql"), init).unwrap();
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0")
        .and_then(|l| l.local_addr())
        .unwrap()
        .port()
}

/// Starts a server and waits until it lets us in; `None` if it ended.
fn launch(directory: &Path, options: &[String], port: u16) -> Option<Child> {
    let log = std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(directory.join("log"))
        .unwrap();
    let file = |name: &str| directory.join(name).display().to_string();
    let mut command = Command::new(find("mariadbd"));
    command
        .arg("--no-defaults")
        .arg(format!("--datadir={}", file("data")))
        .arg(format!("--socket={}", file("socket")))
        .arg(format!("--pid-file={}", file("pid")))
        .arg(format!("--init-file={}", file("init.sql")))
        .arg(format!("--port={port}"))
        .arg(format!("--user={}", own_user()))
        .args(["--bind-address=127.0.0.1", "--skip-networking=0"])
        .args(["--skip-name-resolve"])
        .args([
            "--innodb-flush-log-at-trx-commit=2",
            "--innodb-use-native-aio=0",
        ])
        .args([
            "--innodb-buffer-pool-size=64M",
            "--innodb-log-file-size=32M",
        ])
        .args(["--performance-schema=OFF", "--max-allowed-packet=64M"])
        .args(options)
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log);
    // A Ctrl-C at the terminal is for the tests; the server goes when they have gone. In a session
    // of its own, as a server is, it also gets its share of a busy machine.
    // SAFETY: setsid is one of the calls that are allowed between fork and exec.
    unsafe {
        command.pre_exec(|| match libc::setsid() {
            -1 => Err(std::io::Error::last_os_error()),
            _ => Ok(()),
        });
    }
    let mut child = command
        .spawn()
        .expect("mariadbd cannot be run: the tests need MariaDB's server");
    std::fs::write(directory.join("server"), child.id().to_string()).unwrap();
    let deadline = Instant::now() + STARTUP;
    let url = format!("mysql://{USER}:{}@127.0.0.1:{port}/", encode(PASSWORD));
    while Instant::now() < deadline {
        if child.try_wait().unwrap().is_some() {
            return None;
        }
        let up = block_on(async { Conn::from_url(&url).await.is_ok() });
        if up {
            return Some(child);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let _ = child.kill();
    let _ = child.wait();
    None
}

/// A server of one test, with settings of its own: killed and removed when this goes.
pub struct PrivateServer {
    directory: PathBuf,
    port: u16,
    options: Vec<String>,
    process: Mutex<Option<Child>>,
    databases: AtomicU32,
}

impl PrivateServer {
    /// Starts a server that writes a binlog, with more options of mariadbd's.
    pub fn with_binlog(options: &[&str]) -> Self {
        let binlog = ["--log-bin=binlog", "--server-id=1", "--userstat=1"];
        Self::start(&[&binlog, options].concat())
    }

    /// Starts a server with these options of mariadbd's.
    pub fn start(options: &[&str]) -> Self {
        // Making the files of a server takes seconds, copying them does not.
        static TEMPLATE: OnceLock<tempfile::TempDir> = OnceLock::new();
        let template = TEMPLATE.get_or_init(|| {
            let directory = tempfile::tempdir().unwrap();
            // What is static is never dropped.
            watch(directory.path());
            install(directory.path());
            directory
        });
        let directory = tempfile::Builder::new()
            .prefix("ctlfs-test-mariadb-")
            .tempdir()
            .unwrap()
            .keep();
        watch(&directory);
        let copied = Command::new("cp")
            .arg("-a")
            .arg(template.path().join("data"))
            .arg(template.path().join("init.sql"))
            .arg(&directory)
            .status()
            .unwrap();
        assert!(copied.success(), "cannot copy the files of a server");
        let options: Vec<String> = options.iter().map(|o| (*o).to_owned()).collect();
        for _ in 0..5 {
            let port = free_port();
            if let Some(child) = launch(&directory, &options, port) {
                return PrivateServer {
                    directory,
                    port,
                    options,
                    process: Mutex::new(Some(child)),
                    databases: AtomicU32::new(0),
                };
            }
        }
        does_not_start(&directory);
    }

    /// `host:port`.
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// A new database on it.
    pub fn database(&self) -> TestDatabase {
        let number = self.databases.fetch_add(1, Ordering::Relaxed);
        database_on(&own_server(self.port), format!("ctlfs_test_{number}"))
    }

    /// Runs statements of an administrator's.
    pub fn run(&self, sql: &str) {
        run(&own_server(self.port), None, sql);
    }

    /// A user with the privileges that following `database` takes, and no others; its URL.
    pub fn follower(&self, database: &TestDatabase) -> String {
        let user = format!("'{FOLLOWER}'@'127.0.0.1'");
        for sql in [
            format!("CREATE USER IF NOT EXISTS {user} IDENTIFIED BY 'follow'"),
            format!(
                "GRANT SELECT ON {}.ctlstore_dml_ledger TO {user}",
                database.name
            ),
            format!("GRANT REPLICATION SLAVE, REPLICATION CLIENT ON *.* TO {user}"),
        ] {
            self.run(&sql);
        }
        database.url_of(FOLLOWER, "follow")
    }

    /// How many SELECTs the user of [`PrivateServer::follower`] has sent.
    pub fn selects_of_followers(&self) -> u64 {
        let sql = format!(
            "SELECT select_commands FROM information_schema.user_statistics \
             WHERE user = '{FOLLOWER}'"
        );
        let count: Option<u64> = block_on(async {
            let mut conn = connect(&own_server(self.port), None).await;
            conn.query_first(sql).await.unwrap()
        });
        count.unwrap_or(0)
    }

    /// The value of a status variable that is a number.
    pub fn counter(&self, name: &str) -> u64 {
        let sql = format!("SHOW GLOBAL STATUS WHERE Variable_name = '{name}'");
        let value: Option<(String, u64)> = block_on(async {
            let mut conn = connect(&own_server(self.port), None).await;
            conn.query_first(sql).await.unwrap()
        });
        value.expect("there is such a variable").1
    }

    /// The numbers of the connections that follow the binlog.
    pub fn dump_threads(&self) -> Vec<u64> {
        let sql = "SELECT id FROM information_schema.processlist WHERE command = 'Binlog Dump'";
        let mut tries = 0;
        loop {
            let found = block_on(async {
                let mut conn = connect(&own_server(self.port), None).await;
                conn.query(sql).await
            });
            tries += 1;
            match found {
                Ok(found) => return found,
                // A server that is busy ending and taking connections can drop one.
                Err(error) => assert!(tries < 5, "{error}"),
            }
        }
    }

    /// Ends it, in an orderly way or as a crash does.
    pub fn stop(&self, orderly: bool) {
        let mut process = self.process.lock().unwrap();
        if let Some(mut child) = process.take() {
            let pid = i32::try_from(child.id()).unwrap();
            let signal = if orderly {
                libc::SIGTERM
            } else {
                libc::SIGKILL
            };
            // SAFETY: kill takes no pointers; the process is our child and not yet waited for.
            unsafe { libc::kill(pid, signal) };
            child.wait().unwrap();
        }
    }

    /// Starts it again where it was.
    pub fn start_again(&self) {
        let child = launch(&self.directory, &self.options, self.port);
        let Some(child) = child else {
            does_not_start(&self.directory);
        };
        *self.process.lock().unwrap() = Some(child);
    }
}

impl Drop for PrivateServer {
    fn drop(&mut self) {
        if let Ok(Some(mut child)) = self.process.lock().map(|mut process| process.take()) {
            let _ = child.kill();
            let _ = child.wait();
        }
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

/// Starts a process that waits for the end of this one, however it comes, and then kills the
/// server and removes its directory. (The kernel's parent-death signal goes by the thread that
/// started the child, and a test's thread ends long before its process.)
fn watch(directory: &Path) {
    // The watcher's standard input ends when this process does; nothing is ever written to it.
    let script = "cat >/dev/null; kill -9 $(cat \"$0/server\") 2>/dev/null; rm -rf \"$0\"";
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
