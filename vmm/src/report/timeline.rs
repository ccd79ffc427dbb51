// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A picture of a run: pages over time, coloured by the path that fetched them.

use std::fmt::Write;

use demand_memory::{FaultPath, TimelineEvent};

const WIDTH: f64 = 960.0;
const HEIGHT: f64 = 420.0;
const LEFT: f64 = 80.0;
const TOP: f64 = 50.0;
const COLUMNS: usize = 480;

fn colour(path: FaultPath) -> &'static str {
    match path {
        FaultPath::Guest => "#2f6fb7",
        FaultPath::HypervisorInternal => "#8a5fbf",
        FaultPath::Vmm => "#e0a100",
        FaultPath::BackEnd => "#c8452d",
        FaultPath::Fill => "#9aa5b1",
    }
}

/// Draws the events as an SVG: the pages present over time, stacked by path. `total_pages` is the
/// number of pages at the top of the picture.
pub(crate) fn svg(title: &str, events: &[TimelineEvent], total_pages: u64) -> String {
    let end_us = events.iter().map(|event| event.at_us).max().unwrap_or(0).max(1);
    // For each column and path, the number of pages that had arrived by the column's end.
    let mut arrived = vec![[0u64; FaultPath::ALL.len()]; COLUMNS];
    for event in events {
        let column = (event.at_us as u128 * (COLUMNS as u128 - 1) / end_us as u128) as usize;
        arrived[column][event.path as usize] += event.pages;
    }
    for column in 1..COLUMNS {
        let before = arrived[column - 1];
        arrived[column].iter_mut().zip(before).for_each(|(now, before)| *now += before);
    }
    let x = |column: usize| LEFT + column as f64 * WIDTH / (COLUMNS as f64 - 1.0);
    let y = |pages: u64| TOP + HEIGHT * (1.0 - pages as f64 / total_pages.max(1) as f64);

    let mut out = String::new();
    let mut put = |text: std::fmt::Arguments<'_>| {
        out.write_fmt(text).expect("writing to a String cannot fail");
        out.push('\n');
    };
    put(format_args!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {} {}\" \
         font-family=\"sans-serif\" font-size=\"13\">",
        LEFT + WIDTH + 30.0,
        TOP + HEIGHT + 80.0
    ));
    put(format_args!("<rect width=\"100%\" height=\"100%\" fill=\"white\"/>"));
    put(format_args!("<text x=\"{LEFT}\" y=\"28\" font-size=\"17\">{}</text>", escape(title)));
    for quarter in 0..=4u64 {
        let pages = total_pages * quarter / 4;
        put(format_args!(
            "<line x1=\"{LEFT}\" x2=\"{}\" y1=\"{2:.1}\" y2=\"{2:.1}\" stroke=\"#ddd\"/>\
             <text x=\"{1}\" y=\"{3:.1}\" text-anchor=\"end\">{pages}</text>",
            LEFT + WIDTH,
            LEFT - 8.0,
            y(pages),
            y(pages) + 4.0
        ));
        put(format_args!(
            "<text x=\"{:.1}\" y=\"{}\" text-anchor=\"{}\">{:.1} ms</text>",
            LEFT + WIDTH * quarter as f64 / 4.0,
            TOP + HEIGHT + 20.0,
            if quarter == 4 { "end" } else { "middle" },
            end_us as f64 * quarter as f64 / 4000.0
        ));
    }
    let below = |column: usize, paths: usize| arrived[column][..paths].iter().sum::<u64>();
    for (index, path) in FaultPath::ALL.into_iter().enumerate() {
        if arrived[COLUMNS - 1][index] == 0 {
            continue;
        }
        let mut points = String::new();
        let upper = (0..COLUMNS).map(|column| (column, index + 1));
        let lower = (0..COLUMNS).rev().map(|column| (column, index));
        for (column, paths) in upper.chain(lower) {
            write!(points, "{:.1},{:.1} ", x(column), y(below(column, paths)))
                .expect("writing to a String cannot fail");
        }
        put(format_args!("<polygon points=\"{}\" fill=\"{}\"/>", points.trim_end(), colour(path)));
    }
    let mut at = LEFT;
    for (index, path) in FaultPath::ALL.into_iter().enumerate() {
        let label = format!("{} ({} pages)", path.name(), arrived[COLUMNS - 1][index]);
        put(format_args!(
            "<rect x=\"{at}\" y=\"{}\" width=\"12\" height=\"12\" fill=\"{}\"/>\
             <text x=\"{}\" y=\"{}\">{label}</text>",
            TOP + HEIGHT + 46.0,
            colour(path),
            at + 18.0,
            TOP + HEIGHT + 57.0
        ));
        at += WIDTH / FaultPath::ALL.len() as f64;
    }
    put(format_args!("</svg>"));
    out
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_used_path_has_its_colour() {
        let event = |at_us, pages, path| TimelineEvent { at_us, pages, path };
        let events = [event(10, 3, FaultPath::Guest), event(500, 512, FaultPath::BackEnd)];
        let svg = svg("1 < 2", &events, 1024);
        assert!(svg.contains("1 &lt; 2"));
        assert_eq!(svg.matches("<polygon").count(), 2);
        for path in [FaultPath::Guest, FaultPath::BackEnd] {
            assert_eq!(svg.matches(colour(path)).count(), 2, "area and legend");
        }
        assert!(svg.contains("back_end (512 pages)"));
    }

    #[test]
    fn nothing_at_all_can_be_drawn() {
        assert!(svg("empty", &[], 0).ends_with("</svg>\n"));
    }
}
