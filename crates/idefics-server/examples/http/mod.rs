//! A client that costs next to nothing: blocking HTTP over one connection, for measuring the other side.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
};

use anyhow::{Context, bail};
use serde_json::Value;

/// One connection, kept open.
pub(crate) struct Client {
    address: String,
    key: Option<String>,
    stream: BufReader<TcpStream>,
}

/// What came back.
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) body: Vec<u8>,
}

impl Client {
    /// Connects to `HOST:PORT`; `key` is the server's API key.
    pub(crate) fn connect(address: &str, key: Option<String>) -> anyhow::Result<Self> {
        let stream = TcpStream::connect(address).with_context(|| format!("cannot connect to {address}"))?;
        stream.set_nodelay(true)?;
        Ok(Self { address: address.to_owned(), key, stream: BufReader::new(stream) })
    }

    pub(crate) fn get(&mut self, path: &str) -> anyhow::Result<Reply> {
        self.send("GET", path, "")?;
        self.reply(|_| ())
    }

    pub(crate) fn post(&mut self, path: &str, json: &Value) -> anyhow::Result<Reply> {
        self.post_watched(path, json, |_| ())
    }

    /// The same; `on_chunk` sees each part of a streamed body as it comes.
    pub(crate) fn post_watched(
        &mut self,
        path: &str,
        json: &Value,
        on_chunk: impl FnMut(&[u8]),
    ) -> anyhow::Result<Reply> {
        self.send("POST", path, &json.to_string())?;
        self.reply(on_chunk)
    }

    fn send(&mut self, method: &str, path: &str, body: &str) -> anyhow::Result<()> {
        let key = self.key.as_ref().map_or(String::new(), |key| format!("authorization: Bearer {key}\r\n"));
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: {}\r\ncontent-type: application/json\r\n{key}content-length: {}\r\n\r\n",
            self.address,
            body.len()
        );
        self.stream.get_mut().write_all(format!("{head}{body}").as_bytes())?;
        Ok(())
    }

    fn line(&mut self) -> anyhow::Result<String> {
        let mut line = String::new();
        if self.stream.read_line(&mut line)? == 0 {
            bail!("the connection was closed");
        }
        Ok(line.trim_end().to_owned())
    }

    fn reply(&mut self, mut on_chunk: impl FnMut(&[u8])) -> anyhow::Result<Reply> {
        let status = self.line()?;
        let status =
            status.split(' ').nth(1).and_then(|status| status.parse().ok()).context("a status line")?;
        let (mut length, mut is_chunked) = (0, false);
        loop {
            let line = self.line()?.to_ascii_lowercase();
            match line.split_once(':') {
                None => break,
                Some(("content-length", value)) => length = value.trim().parse()?,
                Some(("transfer-encoding", value)) => is_chunked = value.trim() == "chunked",
                Some(_) => {}
            }
        }
        let mut body = vec![0; length];
        self.stream.read_exact(&mut body)?;
        loop {
            if !is_chunked {
                break;
            }
            let length = usize::from_str_radix(&self.line()?, 16)?;
            let mut chunk = vec![0; length + 2];
            self.stream.read_exact(&mut chunk)?;
            if length == 0 {
                break;
            }
            on_chunk(&chunk[..length]);
            body.extend_from_slice(&chunk[..length]);
        }
        Ok(Reply { status, body })
    }
}

impl Reply {
    #[allow(dead_code, reason = "every example that uses this module needs some of it")]
    pub(crate) fn json(&self) -> anyhow::Result<Value> {
        serde_json::from_slice(&self.body).context("the reply is not JSON")
    }
}
