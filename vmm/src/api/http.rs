// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! HTTP/1.1 messages with JSON bodies, as far as the API needs them: RFC 9110 (semantics) and RFC
//! 9112 (framing). The functions work on bytes only, without sockets.
//!
//! The parser refuses ambiguous requests, after which the server closes the connection: two
//! lengths, a length beside a transfer coding, a second `Host`.

use std::fmt::Write;

use demand_memory::to_usize;
use serde::Serialize;

/// Maximum length of a message's head (its first line and its headers), in bytes.
pub const MAX_HEAD: usize = 16 << 10;
/// Maximum number of headers of a message.
pub const MAX_HEADERS: usize = 64;
/// Maximum length of a request's body, in bytes.
pub const MAX_BODY: usize = 64 << 10;

/// The server's message to a client that waits before it sends its body (RFC 9110, 10.1.1).
pub const CONTINUE: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";

/// The head of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    /// The method as sent: methods are case-sensitive.
    pub method: String,
    /// The path of the target, without host and query.
    pub path: String,
    /// Length of the body in bytes, at most [`MAX_BODY`]; `None` without a Content-Length, which
    /// means no body.
    pub body: Option<usize>,
    /// Whether the client waits for a "100 Continue" before it sends its body.
    pub expects_continue: bool,
    /// Whether the client may send another request on the connection.
    pub keep_alive: bool,
    /// Whether the client knows bodies in chunks, which HTTP/1.0 does not have.
    pub knows_chunks: bool,
    /// Length of the head in bytes.
    pub len: usize,
}

/// Parses the head of a request at the start of `bytes`. Returns `None` if it is incomplete.
///
/// # Errors
///
/// The answer for the client. The server must then close the connection, because the start of the
/// next request is unknown.
///
/// # Examples
///
/// ```
/// use demand_vmm::api::http::parse_head;
///
/// let bytes = b"GET /api/v1/status HTTP/1.1\r\nHost: vmm\r\n\r\n";
/// let head = parse_head(bytes).unwrap().unwrap();
/// assert_eq!((head.path.as_str(), head.len), ("/api/v1/status", bytes.len()));
/// assert_eq!(parse_head(&bytes[..20]), Ok(None));
/// ```
pub fn parse_head(bytes: &[u8]) -> Result<Option<Head>, Response> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    let status = request.parse(bytes).map_err(|error| match error {
        httparse::Error::TooManyHeaders => {
            unparsed(431, format_args!("it has more than {MAX_HEADERS} headers; send fewer"))
        }
        httparse::Error::Version => {
            unparsed(505, "only HTTP/1.0 and HTTP/1.1 are supported; use one of them")
        }
        error => unparsed(400, format_args!("it is not HTTP: {error}; send HTTP/1.1")),
    })?;
    let len = match status {
        httparse::Status::Complete(len) if len <= MAX_HEAD => len,
        httparse::Status::Partial if bytes.len() < MAX_HEAD => return Ok(None),
        // Empty lines may precede the first line.
        _ if request.version.is_none() => {
            return Err(unparsed(
                414,
                format_args!("its first line is longer than {MAX_HEAD} bytes; shorten it"),
            ));
        }
        _ => {
            return Err(unparsed(
                431,
                format_args!("its headers are longer than {MAX_HEAD} bytes; shorten them"),
            ));
        }
    };
    let fields = Fields(request.headers);
    let is_1_1 = request.version == Some(1);
    let hosts = fields.all("host").count();
    if hosts > 1 || (is_1_1 && hosts == 0) {
        return Err(unparsed(400, "in HTTP/1.1 it needs one Host header; send one"));
    }
    if fields.all("transfer-encoding").next().is_some() {
        return Err(unparsed(
            501,
            "chunked bodies are not supported; send the body with a Content-Length",
        ));
    }
    let body = fields
        .content_length()
        .map_err(|error| unparsed(400, format_args!("{error}; send one length")))?;
    if body.is_some_and(|len| len > MAX_BODY as u64) {
        return Err(unparsed(
            413,
            format_args!("its body is longer than {MAX_BODY} bytes; send a shorter one"),
        ));
    }
    let expects_continue = match fields.all("expect").next() {
        // HTTP/1.0 has no Expect header (RFC 9110, 10.1.1).
        Some(value) if is_1_1 => {
            if !value.eq_ignore_ascii_case(b"100-continue") {
                return Err(unparsed(
                    417,
                    "only 100-continue can be expected; leave out the header Expect",
                ));
            }
            true
        }
        _ => false,
    };
    Ok(Some(Head {
        method: request.method.unwrap_or_default().into(),
        path: path_of(request.path.unwrap_or_default()).into(),
        body: body.map(to_usize),
        expects_continue,
        keep_alive: fields.keep_alive(is_1_1),
        knows_chunks: is_1_1,
        len,
    }))
}

/// Returns the answer to a request that cannot be parsed; `why` has the cause and the hint.
fn unparsed(status: u16, why: impl std::fmt::Display) -> Response {
    Response::error(status, format!("cannot parse the request: {why}"))
}

/// Returns the path of a request's target, which may be a full URI (RFC 9112, 3.2.2).
fn path_of(target: &str) -> &str {
    let target = match target.split_once("://") {
        Some((scheme, rest)) if !scheme.contains('/') => {
            rest.find('/').map_or("/", |at| &rest[at..])
        }
        _ => target,
    };
    target.split('?').next().unwrap_or(target)
}

/// The headers of a message.
struct Fields<'a>(&'a [httparse::Header<'a>]);

impl<'a> Fields<'a> {
    /// Returns the values of a header; `name` is in lower case.
    fn all(&self, name: &'static str) -> impl Iterator<Item = &'a [u8]> {
        self.0
            .iter()
            .filter(move |header| header.name.eq_ignore_ascii_case(name))
            .map(|header| header.value.trim_ascii())
    }

    /// Returns the length of the body; several equal values count as one (RFC 9112, 6.3).
    fn content_length(&self) -> Result<Option<u64>, LengthError> {
        let mut length = None;
        for value in self.all("content-length").flat_map(|values| values.split(|&b| b == b',')) {
            let digits = value.trim_ascii();
            if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
                return Err(LengthError::NotANumber);
            }
            // A number that overflows a u64 is too large in any case.
            let value = std::str::from_utf8(digits).ok().and_then(|text| text.parse().ok());
            let value: u64 = value.unwrap_or(u64::MAX);
            if length.is_some_and(|length| length != value) {
                return Err(LengthError::Ambiguous);
            }
            length = Some(value);
        }
        Ok(length)
    }

    /// Returns whether the connection persists after this request (RFC 9112, 9.3).
    fn keep_alive(&self, is_1_1: bool) -> bool {
        let said = |word: &[u8]| {
            self.all("connection")
                .flat_map(|values| values.split(|&b| b == b','))
                .any(|value| value.trim_ascii().eq_ignore_ascii_case(word))
        };
        !said(b"close") && (is_1_1 || said(b"keep-alive"))
    }
}

/// An error from a Content-Length that gives no length.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LengthError {
    /// The value is not a number.
    #[error("its Content-Length is not a number of bytes")]
    NotANumber,
    /// The header is repeated with another value.
    #[error("it has two different Content-Lengths")]
    Ambiguous,
}

/// The fault of a response that cannot be parsed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ResponseError {
    /// It is not HTTP.
    #[error("it is not HTTP: {0}")]
    NotHttp(#[source] httparse::Error),
    /// Its head is longer than [`MAX_HEAD`].
    #[error("its head is too long")]
    LongHead,
    /// Its Content-Length gives no length.
    #[error(transparent)]
    Length(#[from] LengthError),
    /// It has no Content-Length, and is not in chunks.
    #[error("it has no Content-Length")]
    NoLength,
    /// A chunk of its body cannot be parsed.
    #[error("a chunk of its body is malformed")]
    Chunk,
    /// Its body is too long.
    #[error("it is longer than {most} bytes")]
    TooLong {
        /// Maximum length that the caller accepts, in bytes.
        most: usize,
    },
}

/// A response: its status, and its JSON body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    /// The status code.
    pub status: u16,
    /// The body.
    pub body: Vec<u8>,
    /// The methods of the target, if the request's method is not one of them.
    pub allow: Option<&'static str>,
    /// The media type of the body.
    pub content_type: &'static str,
}

/// The media type of JSON.
const JSON: &str = "application/json";

impl Response {
    /// Returns a response without a body, to which one is added.
    pub(crate) fn empty(status: u16) -> Self {
        Response { status, body: Vec::new(), allow: None, content_type: JSON }
    }

    /// Returns a response with a value, or the error if the value cannot be written as JSON.
    pub fn json(status: u16, value: &impl Serialize) -> Self {
        match serde_json::to_vec(value) {
            Ok(mut body) => {
                // A line break, for people who read it in a terminal.
                body.push(b'\n');
                Response { body, ..Response::empty(status) }
            }
            Err(error) => {
                Response::error(500, format!("cannot write the answer: {error}; repeat it"))
            }
        }
    }

    /// Returns a response with the body `{"error": "one line"}`.
    pub fn error(status: u16, message: impl Into<String>) -> Self {
        Response::json(status, &ErrorBody { error: message.into() })
    }

    /// Returns the bytes of the response. Without `with_body` these are only the head, as for HEAD.
    pub fn to_bytes(&self, keep_alive: bool, with_body: bool) -> Vec<u8> {
        let mut head = format!(
            "HTTP/1.1 {} {}\r\nContent-Type: {}\r\nContent-Length: {}\r\nConnection: {}\r\n",
            self.status,
            reason(self.status),
            self.content_type,
            self.body.len(),
            if keep_alive { "keep-alive" } else { "close" },
        );
        if let Some(methods) = self.allow {
            let _ = write!(head, "Allow: {methods}\r\n");
        }
        head.push_str("\r\n");
        let mut bytes = head.into_bytes();
        if with_body {
            bytes.extend_from_slice(&self.body);
        }
        bytes
    }

    /// Parses a response at the start of `bytes`, and returns it with its length in bytes. Returns
    /// `None` if it is incomplete. A response without a length is an error, because the API always
    /// sends one, or chunks.
    ///
    /// # Errors
    ///
    /// The fault of the response, as a part of a sentence.
    pub fn parse(bytes: &[u8], most: usize) -> Result<Option<(Self, usize)>, ResponseError> {
        let Some(ResponseHead { status, body, len }) = ResponseHead::parse(bytes)? else {
            return Ok(None);
        };
        let too_long =
            |length| if length > most { Err(ResponseError::TooLong { most }) } else { Ok(()) };
        if let Some(length) = body {
            too_long(length)?;
            let end = len + length;
            let Some(body) = bytes.get(len..end) else { return Ok(None) };
            let body = body.to_vec();
            return Ok(Some((Response { body, ..Response::empty(status) }, end)));
        }
        let (mut body, mut end) = (Vec::new(), len);
        loop {
            let left = most - body.len();
            let chunk = parse_chunk(&bytes[end..], left).map_err(|error| match error {
                ResponseError::TooLong { .. } => ResponseError::TooLong { most },
                error => error,
            })?;
            let Some((chunk, len)) = chunk else { break };
            end += len;
            if chunk.is_empty() {
                return Ok(Some((Response { body, ..Response::empty(status) }, end)));
            }
            body.extend_from_slice(chunk);
        }
        // Many small chunks: their sizes take more room than their data.
        if bytes.len() > most.saturating_add(MAX_HEAD) {
            return Err(ResponseError::TooLong { most });
        }
        Ok(None)
    }
}

/// The head of a response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ResponseHead {
    /// The status code.
    pub(crate) status: u16,
    /// Length of the body in bytes; `None` if it comes in chunks.
    pub(crate) body: Option<usize>,
    /// Length of the head in bytes.
    pub(crate) len: usize,
}

impl ResponseHead {
    /// Parses a head at the start of `bytes`. Returns `None` if it is incomplete.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Option<Self>, ResponseError> {
        let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
        let mut response = httparse::Response::new(&mut headers);
        let status = response.parse(bytes).map_err(ResponseError::NotHttp)?;
        let httparse::Status::Complete(len) = status else {
            return if bytes.len() < MAX_HEAD { Ok(None) } else { Err(ResponseError::LongHead) };
        };
        let fields = Fields(response.headers);
        let is_chunked =
            fields.all("transfer-encoding").any(|it| it.eq_ignore_ascii_case(b"chunked"));
        let body = match fields.content_length()? {
            _ if is_chunked => None,
            Some(length) => Some(to_usize(length)),
            None => return Err(ResponseError::NoLength),
        };
        Ok(Some(ResponseHead { status: response.code.unwrap_or_default(), body, len }))
    }
}

/// The head of a response whose body is lines of JSON in chunks (RFC 9112, 7.1), up to the end of
/// the connection.
pub(crate) const LINES_HEAD: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\n\
    Transfer-Encoding: chunked\r\nCache-Control: no-store\r\nConnection: close\r\n\r\n";

/// The chunk that ends a body.
pub(crate) const LAST_CHUNK: &[u8] = b"0\r\n\r\n";

/// Returns a chunk with a value as a line of JSON.
pub(crate) fn line_chunk(value: &impl Serialize) -> serde_json::Result<Vec<u8>> {
    let line = serde_json::to_string(value)? + "\n";
    Ok(format!("{:x}\r\n{line}\r\n", line.len()).into_bytes())
}

/// Maximum length of the line with a chunk's size, in bytes: extensions may follow the number.
const MAX_CHUNK_SIZE: usize = 256;

/// Parses a chunk at the start of `bytes`, and returns its data with the length of the whole chunk
/// in bytes. Returns `None` if it is incomplete. The last chunk has no data. A chunk that announces
/// more than `most` bytes is refused before its data arrives, and so is an endless size.
pub(crate) fn parse_chunk(
    bytes: &[u8],
    most: usize,
) -> Result<Option<(&[u8], usize)>, ResponseError> {
    let size = httparse::parse_chunk_size(bytes).map_err(|_| ResponseError::Chunk)?;
    let httparse::Status::Complete((start, size)) = size else {
        return if bytes.len() < MAX_CHUNK_SIZE { Ok(None) } else { Err(ResponseError::Chunk) };
    };
    let size = usize::try_from(size).ok().filter(|size| *size <= most);
    let end = start + size.ok_or(ResponseError::TooLong { most })?;
    let Some(rest) = bytes.get(end..).filter(|rest| rest.len() >= 2) else { return Ok(None) };
    // The API sends no trailers, which could follow the last chunk.
    if !rest.starts_with(b"\r\n") {
        return Err(ResponseError::Chunk);
    }
    Ok(Some((&bytes[start..end], end + 2)))
}

/// The body of an error response.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
pub(crate) struct ErrorBody {
    /// One line: the operation, the cause, and a remedy.
    pub(crate) error: String,
}

/// Returns the reason phrase of a status (RFC 9110, 15).
fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        400 => "Bad Request",
        404 => "Not Found",
        405 => "Method Not Allowed",
        408 => "Request Timeout",
        409 => "Conflict",
        411 => "Length Required",
        413 => "Content Too Large",
        414 => "URI Too Long",
        417 => "Expectation Failed",
        431 => "Request Header Fields Too Large",
        500 => "Internal Server Error",
        501 => "Not Implemented",
        503 => "Service Unavailable",
        505 => "HTTP Version Not Supported",
        // The phrase has no meaning and may be empty (RFC 9112, 4).
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(text: &str) -> Head {
        parse_head(text.as_bytes()).unwrap().unwrap()
    }

    fn refusal(text: &str) -> u16 {
        parse_head(text.as_bytes()).unwrap_err().status
    }

    #[test]
    fn head_gives_body_length_and_keep_alive() {
        let text = "PUT /api/v1/snapshot?x=1 HTTP/1.1\r\nhost: a\r\nContent-Length: 2, 2\r\n\
                    Expect: 100-Continue\r\n\r\n{}GET";
        let whole = head(text);
        assert_eq!((whole.method.as_str(), whole.path.as_str()), ("PUT", "/api/v1/snapshot"));
        assert_eq!((whole.body, whole.len), (Some(2), text.len() - 5));
        assert!(whole.expects_continue && whole.keep_alive);
        for len in 0..whole.len {
            assert_eq!(parse_head(&text.as_bytes()[..len]), Ok(None), "{len}");
        }
        for (version, connection, lasts) in [
            ("1.1", "x", true),
            ("1.1", "x, Close", false),
            ("1.0", "x", false),
            ("1.0", "Keep-Alive", true),
            ("1.0", "keep-alive, close", false),
        ] {
            let text =
                format!("GET / HTTP/{version}\r\nHost: a\r\nConnection: {connection}\r\n\r\n");
            assert_eq!(head(&text).keep_alive, lasts, "{text}");
        }
        assert!(!head("GET / HTTP/1.0\r\nExpect: 100-continue\r\n\r\n").expects_continue);
    }

    #[test]
    fn a_target_may_be_a_whole_uri() {
        for (target, path) in [
            ("http://vmm/api/v1/status?a=b", "/api/v1/status"),
            ("http://vmm", "/"),
            ("/a?b=http://c/d", "/a"),
            ("/a://b/c", "/a://b/c"),
            ("*", "*"),
        ] {
            assert_eq!(path_of(target), path);
        }
    }

    #[test]
    fn chunks_are_read_as_they_were_written() {
        let mut bytes = LINES_HEAD.to_vec();
        for value in ["a", "b\n"] {
            bytes.extend(line_chunk(&value).unwrap());
        }
        bytes.extend_from_slice(LAST_CHUNK);
        for len in 0..bytes.len() {
            assert_eq!(Response::parse(&bytes[..len], 100), Ok(None), "{len}");
        }
        let (answer, len) = Response::parse(&bytes, 100).unwrap().unwrap();
        assert_eq!((answer.status, len), (200, bytes.len()));
        assert_eq!(answer.body, b"\"a\"\n\"b\\n\"\n");
        assert_eq!(Response::parse(&bytes, 3), Err(ResponseError::TooLong { most: 3 }));
        for wrong in ["x\r\n", "1\r\nabc", "10000000000000000\r\na", "-1\r\na"] {
            assert_eq!(parse_chunk(wrong.as_bytes(), 100), Err(ResponseError::Chunk), "{wrong}");
        }
    }

    #[test]
    fn oversized_chunks_are_refused_at_once() {
        let too_long = Err(ResponseError::TooLong { most: 100 });
        for size in ["65\r\n", "ffffffffffffffff\r\n", "7fffffffffffffff\r\na"] {
            assert_eq!(
                parse_chunk(size.as_bytes(), 100),
                Err(ResponseError::TooLong { most: 100 })
            );
        }
        assert_eq!(parse_chunk(b"64\r\n", 100), Ok(None));
        let endless = format!("1;{}", "a".repeat(MAX_CHUNK_SIZE));
        assert_eq!(parse_chunk(endless.as_bytes(), 100), Err(ResponseError::Chunk));
        // The limit holds for the body, whatever the number of its chunks, and for their sizes.
        let answer = |chunks: &str| [LINES_HEAD, chunks.as_bytes()].concat();
        assert_eq!(Response::parse(&answer("60\r\n"), 100), Ok(None));
        assert_eq!(Response::parse(&answer("2\r\nab\r\n63\r\n"), 100), too_long);
        let wide = format!("1;{}\r\na\r\n", "x".repeat(200)).repeat(90);
        assert_eq!(Response::parse(&answer(&wide), 100), too_long);
    }

    #[test]
    fn each_error_has_its_status() {
        let with = |header: &str| format!("PUT / HTTP/1.1\r\nHost: a\r\n{header}\r\n\r\n");
        assert_eq!(refusal("GET / HTTP/1.1\r\n\r\n"), 400);
        assert_eq!(refusal("\u{1}\r\n\r\n"), 400);
        assert_eq!(refusal("GET / HTTP/2.0\r\n\r\n"), 505);
        for (header, status) in [
            ("Host: b", 400),
            ("Content-Length: 1\r\nContent-Length: 2", 400),
            ("Content-Length: 1, 2", 400),
            ("Content-Length: +1", 400),
            ("Content-Length: -1", 400),
            ("Content-Length:", 400),
            ("Content-Length: 65537", 413),
            ("Content-Length: 99999999999999999999999", 413),
            ("Content-Length: 1\r\nTransfer-Encoding: chunked", 501),
            ("Expect: a miracle", 417),
            (&"a: b\r\n".repeat(MAX_HEADERS), 431),
            (&format!("a: {}", "b".repeat(MAX_HEAD)), 431),
            ("a : b", 400),
            ("a: b\r\n c", 400),
        ] {
            assert_eq!(refusal(&with(header)), status, "{header:.60}");
        }
        assert_eq!(head(&with("Content-Length: 65536")).body, Some(MAX_BODY));
        assert_eq!(refusal(&format!("GET /{}", "a".repeat(MAX_HEAD))), 414);
        assert_eq!(refusal(&"\r\n".repeat(MAX_HEAD)), 414);
        assert_eq!(refusal(&format!("GET / HTTP/1.1\r\na: {}", "b".repeat(MAX_HEAD))), 431);
    }

    #[test]
    fn an_answer_is_read_as_it_was_written() {
        let mut answer = Response::error(405, "it's \"no\"\n");
        answer.allow = Some("GET, HEAD");
        let mut bytes = answer.to_bytes(true, true);
        let text = String::from_utf8(bytes.clone()).unwrap();
        assert!(text.starts_with("HTTP/1.1 405 Method Not Allowed\r\n"), "{text}");
        assert!(text.contains("\r\nAllow: GET, HEAD\r\n"), "{text}");
        for len in 0..bytes.len() {
            assert_eq!(Response::parse(&bytes[..len], 100), Ok(None), "{len}");
        }
        let len = bytes.len();
        bytes.extend_from_slice(b"more");
        answer.allow = None;
        assert_eq!(Response::parse(&bytes, 100), Ok(Some((answer, len))));
        assert!(Response::parse(&bytes, 10).is_err());
        let head = Response::error(404, "x").to_bytes(false, false);
        assert!(head.ends_with(b"Connection: close\r\n\r\n"));
        assert!(Response::parse(b"HTTP/1.1 200 OK\r\n\r\n", 10).is_err());
        assert!(Response::parse(&[b'a'; MAX_HEAD], 10).is_err());
    }
}
