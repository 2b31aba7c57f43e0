//! A way to a server on which one answer gets lost: the statement is carried out, and who sent it
//! never learns of it.
#![allow(dead_code)]

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

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
