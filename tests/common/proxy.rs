//! Ways to a server: one on which an answer gets lost, so that the statement is carried out and who
//! sent it never learns of it; and one that leads from one server to another.
#![allow(dead_code)]

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

/// Listens on a port of its own and passes everything on to `server` (`host:port`), until a
/// client sends something that contains `statement`: when the server begins to answer that, the
/// connection is cut. Once; later connections are left alone. Gives the address to connect to.
pub fn losing_the_answer_to(server: &str, statement: &'static str) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let server = server.to_owned();
    let done = Arc::new(AtomicBool::new(false));
    std::thread::spawn(move || {
        while let Ok((client, _)) = listener.accept() {
            let Ok(server) = TcpStream::connect(&server) else {
                return;
            };
            let (client_again, server_again) =
                (client.try_clone().unwrap(), server.try_clone().unwrap());
            let cut = Arc::new(AtomicBool::new(false));
            let (done, armed) = (Arc::clone(&done), Arc::clone(&cut));
            std::thread::spawn(move || {
                pass(client, server, |bytes| {
                    let text = String::from_utf8_lossy(bytes);
                    if text.contains(statement) && !done.swap(true, Ordering::SeqCst) {
                        armed.store(true, Ordering::SeqCst);
                    }
                    true
                });
            });
            std::thread::spawn(move || {
                pass(server_again, client_again, |_| !cut.load(Ordering::SeqCst));
            });
        }
    });
    address
}

/// Passes bytes on while `goes_on` says so, then closes both ends.
fn pass(mut from: TcpStream, mut to: TcpStream, mut goes_on: impl FnMut(&[u8]) -> bool) {
    let mut buffer = vec![0; 1 << 16];
    while let Ok(n) = from.read(&mut buffer) {
        if n == 0 || !goes_on(&buffer[..n]) || to.write_all(&buffer[..n]).is_err() {
            break;
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}

/// A way to whatever server it points to at the moment, as a name or address that moves from one
/// primary to the next.
pub struct Switch {
    address: String,
    state: Arc<Mutex<Line>>,
}

#[derive(Default)]
struct Line {
    target: String,
    open: Vec<TcpStream>,
    /// Set for the connections that were left open with nobody at their other end.
    silenced: Arc<AtomicBool>,
    ended: bool,
}

impl Switch {
    /// Listens on a port of its own and leads to `target` (`host:port`).
    pub fn to(target: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let switch = Switch {
            address: listener.local_addr().unwrap().to_string(),
            state: Arc::new(Mutex::new(Line {
                target: target.to_owned(),
                ..Line::default()
            })),
        };
        let state = Arc::clone(&switch.state);
        std::thread::spawn(move || {
            while let Ok((client, _)) = listener.accept() {
                let mut line = state.lock().unwrap();
                if line.ended {
                    return;
                }
                // A server that is away: the client sees a connection that closes.
                let Ok(server) = TcpStream::connect(&line.target) else {
                    continue;
                };
                for (from, to) in [(&client, &server), (&server, &client)] {
                    let (from, to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                    let silenced = Arc::clone(&line.silenced);
                    std::thread::spawn(move || pass_unless(from, to, &silenced));
                }
                line.open.extend([client, server]);
            }
        });
        switch
    }

    /// `host:port` to connect to.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Leads to `target` from now on. Connections to the old one are cut, or, when `silently`,
    /// left open with nobody at their other end.
    pub fn point_to(&self, target: &str, silently: bool) {
        let mut line = self.state.lock().unwrap();
        line.target = target.to_owned();
        if silently {
            line.silenced.store(true, Ordering::SeqCst);
            line.silenced = Arc::default();
        } else {
            for stream in line.open.drain(..) {
                // It may be closed already.
                let _ = stream.shutdown(Shutdown::Both);
            }
        }
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        if let Ok(mut line) = self.state.lock() {
            line.ended = true;
            for stream in line.open.drain(..) {
                let _ = stream.shutdown(Shutdown::Both);
            }
        }
        // Wakes the thread that listens.
        let _ = TcpStream::connect(&self.address);
    }
}

/// Passes bytes on until either end closes; swallows them once silenced.
fn pass_unless(mut from: TcpStream, mut to: TcpStream, silenced: &AtomicBool) {
    let mut buffer = vec![0; 1 << 16];
    while let Ok(n @ 1..) = from.read(&mut buffer) {
        if !silenced.load(Ordering::SeqCst) && to.write_all(&buffer[..n]).is_err() {
            break;
        }
    }
    if !silenced.load(Ordering::SeqCst) {
        let _ = to.shutdown(Shutdown::Both);
        let _ = from.shutdown(Shutdown::Both);
    }
}
