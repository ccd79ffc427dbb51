// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A client's stream of the events of a VM.

use std::time::Instant;

use crate::api::client::{AnswerError, Client, ClientError, Exchange, Failure, MAX_ANSWER, value};
use crate::api::endpoint::Endpoint;
use crate::api::events::VmEvent;
use crate::api::http::{Response, ResponseHead, parse_chunk};

/// The events of a VM, from the oldest that the VMM still has.
#[derive(Debug)]
pub struct EventStream {
    client: Client,
    exchange: Exchange,
    is_over: bool,
}

impl Client {
    /// Asks for the VM's events.
    ///
    /// # Errors
    ///
    /// If no VMM listens, or the VMM has too many readers of its events.
    pub fn events(&self) -> Result<EventStream, ClientError> {
        let exchange = self.try_events().map_err(|why| self.error(Endpoint::Events, why))?;
        Ok(EventStream { client: self.clone(), exchange, is_over: false })
    }

    fn try_events(&self) -> Result<Exchange, Failure> {
        let mut exchange = self.send("GET", Endpoint::Events, &[])?;
        let begun = Instant::now();
        loop {
            let head = ResponseHead::parse(&exchange.bytes);
            match head.map_err(|error| Failure::Answer(error.into()))? {
                Some(ResponseHead { status: 200, body: None, len }) => {
                    drop(exchange.bytes.drain(..len));
                    exchange.begun = None;
                    return Ok(exchange);
                }
                Some(head) => {
                    let whole = Response::parse(&exchange.bytes, MAX_ANSWER);
                    if let Some((answer, _)) = whole.map_err(|e| Failure::Answer(e.into()))? {
                        value::<VmEvent>(&answer)?;
                        return Err(Failure::Answer(AnswerError::Status { status: head.status }));
                    }
                }
                None => {}
            }
            if !exchange.fill()? && begun.elapsed() > self.patience {
                return Err(Failure::Silent);
            }
        }
    }
}

impl EventStream {
    /// Returns the next event, for which it waits, or `None` after the last one.
    ///
    /// # Errors
    ///
    /// If the VMM ended without a last event, or sends something else than events.
    pub fn next_event(&mut self) -> Result<Option<VmEvent>, ClientError> {
        self.try_next().map_err(|why| self.client.error(Endpoint::Events, why))
    }

    fn try_next(&mut self) -> Result<Option<VmEvent>, Failure> {
        let wrong = |error: AnswerError| Failure::Answer(error);
        // The time that the caller took since the last event does not count.
        self.exchange.begun = (!self.exchange.bytes.is_empty()).then(Instant::now);
        while !self.is_over {
            let chunk = parse_chunk(&self.exchange.bytes, MAX_ANSWER);
            let chunk = chunk.map_err(|error| wrong(error.into()))?;
            if let Some((line, len)) = chunk {
                self.is_over = line.is_empty();
                let event = (!line.is_empty()).then(|| serde_json::from_slice(line)).transpose();
                let event = event.map_err(|error| wrong(AnswerError::Value(error)))?;
                self.exchange.bytes.drain(..len);
                return Ok(event);
            }
            self.exchange.fill()?;
        }
        Ok(None)
    }
}
