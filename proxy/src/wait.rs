//! `mantle-proxy await`: returns when the proxy beside it is ready. A classic sidecar runs it as its `postStart` hook, for
//! which the kubelet holds back the containers after it: an application's first connection finds the proxy there.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::process::ExitCode;
use std::time::{Duration, Instant};

const USAGE: &str = "usage: mantle-proxy await [--port 4191] [--seconds 120]";
const PAUSE: Duration = Duration::from_millis(100);
/// For one question: the admin port answers at once or not at all.
const PATIENCE: Duration = Duration::from_secs(1);

/// Exit codes: 0 ready, 1 not ready in time, 2 wrong usage.
pub(crate) fn main(args: &[String]) -> ExitCode {
    let Some((port, patience)) = parse(args) else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    match until_ready(port, patience) {
        Ok(()) => ExitCode::SUCCESS,
        Err(last) => {
            let seconds = patience.as_secs();
            eprintln!(
                "mantle-proxy await: not ready after {seconds} s: {last}; the proxy's log says what it waits for"
            );
            ExitCode::FAILURE
        }
    }
}

fn parse(args: &[String]) -> Option<(u16, Duration)> {
    let (mut port, mut patience) = (4191, Duration::from_secs(120));
    for pair in args.chunks(2) {
        match pair {
            [flag, value] if flag == "--port" => port = value.parse().ok().filter(|port| *port != 0)?,
            [flag, value] if flag == "--seconds" => patience = Duration::from_secs(value.parse().ok()?),
            _ => return None,
        }
    }
    Some((port, patience))
}

/// Asks until the answer is 200. The error is the last answer, or why there was none.
#[allow(clippy::disallowed_methods, reason = "a program of its own, without threads: there is nothing else to wait on")]
fn until_ready(port: u16, patience: Duration) -> Result<(), String> {
    let until = Instant::now() + patience;
    loop {
        let last = match ask(port) {
            Ok(answer) if answer.starts_with("HTTP/1.1 200 ") => return Ok(()),
            Ok(answer) => answer.lines().last().unwrap_or_default().to_owned(),
            Err(error) => error.to_string(),
        };
        if Instant::now() >= until {
            return Err(last);
        }
        std::thread::sleep(PAUSE);
    }
}

fn ask(port: u16) -> io::Result<String> {
    let mut io = TcpStream::connect_timeout(&SocketAddr::from((Ipv4Addr::LOCALHOST, port)), PATIENCE)?;
    io.set_read_timeout(Some(PATIENCE))?;
    io.write_all(b"GET /ready HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    io.take(4096).read_to_string(&mut answer)?;
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    fn args(line: &str) -> Vec<String> {
        line.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn it_waits_through_not_ready_and_returns_at_ready() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
        let port = listener.local_addr().expect("bound").port();
        let server = std::thread::spawn(move || {
            for status in ["503 Service Unavailable", "503 Service Unavailable", "200 OK"] {
                let (mut io, _) = listener.accept().expect("asked");
                let mut head = [0; 256];
                let length = io.read(&mut head).expect("a request");
                assert!(head[..length].starts_with(b"GET /ready HTTP/1.1\r\n"));
                write!(io, "HTTP/1.1 {status}\r\nConnection: close\r\n\r\nno certificate yet\n").expect("answers");
            }
        });
        assert_eq!(until_ready(port, Duration::from_secs(20)), Ok(()));
        server.join().expect("asked three times");
    }

    #[test]
    fn in_vain_it_says_what_it_heard_last() {
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|l| l.local_addr()).expect("a port").port();
        let last = until_ready(port, Duration::ZERO).expect_err("nobody listens");
        assert!(last.contains("refused"), "{last}");
    }

    #[test]
    fn flags_are_read_or_refused() {
        assert_eq!(parse(&args("")), Some((4191, Duration::from_secs(120))));
        assert_eq!(parse(&args("--port 5191 --seconds 3")), Some((5191, Duration::from_secs(3))));
        for wrong in ["--port", "--port 0", "--seconds soon", "now", "--port 1 --seconds"] {
            assert_eq!(parse(&args(wrong)), None, "{wrong}");
        }
    }
}
