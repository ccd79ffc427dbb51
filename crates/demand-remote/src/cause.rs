// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The cause of a client's error, as one short line without secrets.
//!
//! The client's own texts contain URLs, whose queries may be signatures, and whole bodies of
//! answers. So its errors are not kept as sources of this crate's errors.

use std::error::Error;

/// Longest part of a server's message, in characters.
const MOST: usize = 200;
/// The beginning of the one text that contains a URL.
const WITH_URL: &str = "Error performing ";
const STATUS: &str = "Server returned non-2xx status code: ";

/// Codes of S3 for credentials that are no longer valid.
#[cfg(feature = "s3")]
const INVALID: [&str; 3] = ["ExpiredToken", "InvalidToken", "InvalidAccessKeyId"];
/// The answer for them without a body, as requests for the head of an object get it.
#[cfg(feature = "s3")]
const WITHOUT_CODE: &str = "the server answers 400 Bad Request";

/// Returns whether a cause is that the credentials are no longer valid.
#[cfg(feature = "s3")]
pub(crate) fn is_invalid_key(cause: &str) -> bool {
    cause.ends_with(WITHOUT_CODE) || cause.split(", ").any(|part| INVALID.contains(&part))
}

/// Returns the cause of an error as one line.
pub(crate) fn cause(error: &object_store::Error) -> String {
    if matches!(error, object_store::Error::NotSupported { .. }) {
        return "the server does not support reads of ranges".into();
    }
    let mut parts: Vec<String> = Vec::new();
    // The outermost text repeats all others, the URL included.
    let mut next = error.source();
    while let Some(error) = next {
        let text = error.to_string();
        let is_new = parts.last().is_none_or(|last| !last.contains(&text));
        if !text.starts_with(WITH_URL) && is_new {
            parts.push(answer(&text).unwrap_or_else(|| line(&text)));
        }
        next = error.source();
    }
    if parts.is_empty() {
        return "the client gave no reason".into();
    }
    parts.join(": ")
}

/// Returns what a server answered, for a text about an answer: its status, and the code and message
/// of S3.
fn answer(text: &str) -> Option<String> {
    let rest = text.strip_prefix(STATUS)?;
    let (status, body) = rest.split_once(": ").unwrap_or((rest, ""));
    let element = |name: &str| {
        let (_, after) = body.split_once(&format!("<{name}>"))?;
        Some(line(after.split_once('<')?.0))
    };
    let said = match (element("Code"), element("Message")) {
        (Some(code), Some(message)) => format!(", {code}, {message}"),
        (Some(code), None) => format!(", {code}"),
        _ => String::new(),
    };
    Some(format!("the server answers {}{said}", line(status)))
}

/// Returns the beginning of the first line of a text, without control characters.
fn line(text: &str) -> String {
    let first = text.trim().lines().next().unwrap_or_default();
    first.chars().filter(|char| !char.is_control()).take(MOST).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_shortened() {
        let text = "Server returned non-2xx status code: 403 Forbidden: <?xml?><Error><Code>\
            ExpiredToken</Code><Message>Too late\x1b[2J</Message></Error>";
        let expected = "the server answers 403 Forbidden, ExpiredToken, Too late[2J";
        assert_eq!(answer(text).unwrap(), expected);
        let html = "Server returned non-2xx status code: 503 Service Unavailable: <html>\r\n<b>";
        assert_eq!(answer(html).unwrap(), "the server answers 503 Service Unavailable");
    }
}
