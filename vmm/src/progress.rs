// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Progress bars, where there is a terminal to draw them on.

use std::io::{self, IsTerminal};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// How far something is. Where standard error is no terminal it draws nothing.
#[derive(Debug)]
pub struct Bar(ProgressBar);

impl Bar {
    /// A bar for `total` of what `unit` names, say "pages present".
    pub fn new(name: &'static str, unit: &str, total: u64) -> Self {
        let target = if io::stderr().is_terminal() {
            ProgressDrawTarget::stderr()
        } else {
            ProgressDrawTarget::hidden()
        };
        let bar = ProgressBar::with_draw_target(Some(total), target);
        let template = format!("{{prefix}} [{{bar:40}}] {{pos}}/{{len}} {unit}, {{elapsed}}");
        if let Ok(style) = ProgressStyle::with_template(&template) {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_prefix(name);
        Bar(bar)
    }

    /// Says how far it is.
    pub fn set(&self, done: u64) {
        self.0.set_position(done);
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
