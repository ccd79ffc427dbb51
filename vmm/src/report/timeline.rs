// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A picture of a run: memory that is present over time, coloured by the path that fetched it; the
//! moments at which a source failed or answered again; and the figures of sources and working set.

use std::fmt::Write;

use demand_memory::{FaultPath, PAGE_SIZE, TimelineEvent};

const WIDTH: f64 = 960.0;
const HEIGHT: f64 = 420.0;
const LEFT: f64 = 80.0;
const TOP: f64 = 50.0;
const COLUMNS: usize = 480;
/// Height of a line of text below the picture.
const LINE: f64 = 18.0;

fn colour(path: FaultPath) -> &'static str {
    match path {
        FaultPath::Guest => "#2f6fb7",
        FaultPath::HypervisorInternal => "#8a5fbf",
        FaultPath::Vmm => "#e0a100",
        FaultPath::BackEnd => "#c8452d",
        FaultPath::Fill => "#9aa5b1",
    }
}

/// The areas of the picture, from the bottom: a path each, and what background fill brought of a
/// working set.
const AREAS: usize = FaultPath::ALL.len() + 1;
const WORKING_SET: usize = AREAS - 1;

/// Returns the areas that the pages of an event belong to, and how many belong to each.
fn areas(event: &TimelineEvent) -> [(usize, u64); 2] {
    // Pages that a fault fetched are the fault's, expected or not.
    let replayed = if event.path == FaultPath::Fill { event.expected } else { 0 };
    [(event.path as usize, event.pages - replayed), (WORKING_SET, replayed)]
}

fn area(index: usize) -> (&'static str, &'static str) {
    match FaultPath::ALL.get(index) {
        Some(path) => (path.name(), colour(*path)),
        None => ("working_set", "#3a9d5d"),
    }
}

/// An event of the run, as a line across the picture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Moment {
    /// Time since the statistics were created, in microseconds.
    pub at_us: u64,
    /// The event, in a few words.
    pub what: &'static str,
}

/// The content of a picture.
pub(crate) struct Picture<'a> {
    pub title: &'a str,
    /// The arrival of pages.
    pub events: &'a [TimelineEvent],
    /// The number of pages at the top of the picture.
    pub total_pages: u64,
    pub moments: &'a [Moment],
    /// The lines below the picture.
    pub figures: &'a [String],
}

/// Formats a point of the time axis in the unit that suits its end.
fn time(at_us: f64, end_us: u64) -> String {
    match end_us {
        0..2_000 => format!("{at_us:.0} us"),
        2_000..2_000_000 => format!("{:.1} ms", at_us / 1e3),
        _ => format!("{:.1} s", at_us / 1e6),
    }
}

/// Formats a point of the memory axis in the unit that suits its end.
fn memory(pages: u64, total_pages: u64) -> String {
    let of = |bytes: u64, shift: u32| {
        let value = bytes as f64 / f64::from(1u32 << shift);
        if value.fract() == 0.0 { format!("{value:.0}") } else { format!("{value:.2}") }
    };
    let bytes = pages.saturating_mul(PAGE_SIZE);
    match total_pages.saturating_mul(PAGE_SIZE) {
        total if total < 2 << 20 => format!("{} KiB", of(bytes, 10)),
        total if total < 2 << 30 => format!("{} MiB", of(bytes, 20)),
        _ => format!("{} GiB", of(bytes, 30)),
    }
}

/// Draws the events as an SVG: the memory that is present over time, stacked by path.
pub(crate) fn svg(picture: &Picture<'_>) -> String {
    let Picture { title, events, total_pages, moments, figures } = *picture;
    let last = events.iter().map(|event| event.at_us);
    let end_us = last.chain(moments.iter().map(|moment| moment.at_us)).max().unwrap_or(0).max(1);
    // For each column and area, the number of pages that had arrived by the column's end.
    let mut arrived = vec![[0u64; AREAS]; COLUMNS];
    for event in events {
        let column = (event.at_us as u128 * (COLUMNS as u128 - 1) / end_us as u128) as usize;
        for (area, pages) in areas(event) {
            arrived[column][area] += pages;
        }
    }
    for column in 1..COLUMNS {
        let before = arrived[column - 1];
        arrived[column].iter_mut().zip(before).for_each(|(now, before)| *now += before);
    }
    let x = |column: usize| LEFT + column as f64 * WIDTH / (COLUMNS as f64 - 1.0);
    let y = |pages: u64| TOP + HEIGHT * (1.0 - pages as f64 / total_pages.max(1) as f64);
    let bottom = TOP + HEIGHT;

    let mut out = String::new();
    let mut put = |text: std::fmt::Arguments<'_>| {
        out.write_fmt(text).expect("writing to a String cannot fail");
        out.push('\n');
    };
    put(format_args!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {} {}\" \
         font-family=\"sans-serif\" font-size=\"13\">",
        LEFT + WIDTH + 30.0,
        bottom + 80.0 + LINE * figures.len() as f64
    ));
    put(format_args!("<rect width=\"100%\" height=\"100%\" fill=\"white\"/>"));
    put(format_args!("<text x=\"{LEFT}\" y=\"28\" font-size=\"17\">{}</text>", escape(title)));
    for quarter in 0..=4u64 {
        let pages = total_pages * quarter / 4;
        put(format_args!(
            "<line x1=\"{LEFT}\" x2=\"{}\" y1=\"{2:.1}\" y2=\"{2:.1}\" stroke=\"#ddd\"/>\
             <text x=\"{1}\" y=\"{3:.1}\" text-anchor=\"end\">{4}</text>",
            LEFT + WIDTH,
            LEFT - 8.0,
            y(pages),
            y(pages) + 4.0,
            memory(pages, total_pages)
        ));
        put(format_args!(
            "<text x=\"{:.1}\" y=\"{}\" text-anchor=\"{}\">{}</text>",
            LEFT + WIDTH * quarter as f64 / 4.0,
            bottom + 20.0,
            if quarter == 4 { "end" } else { "middle" },
            time(end_us as f64 * quarter as f64 / 4.0, end_us)
        ));
    }
    let below = |column: usize, areas: usize| arrived[column][..areas].iter().sum::<u64>();
    let all = arrived[COLUMNS - 1];
    for (index, _) in all.iter().enumerate().filter(|(_, pages)| **pages > 0) {
        let mut points = String::new();
        let upper = (0..COLUMNS).map(|column| (column, index + 1));
        let lower = (0..COLUMNS).rev().map(|column| (column, index));
        for (column, areas) in upper.chain(lower) {
            write!(points, "{:.1},{:.1} ", x(column), y(below(column, areas)))
                .expect("writing to a String cannot fail");
        }
        put(format_args!("<polygon points=\"{}\" fill=\"{}\"/>", points.trim_end(), area(index).1));
    }
    for (index, moment) in moments.iter().enumerate() {
        let at = LEFT + WIDTH * moment.at_us as f64 / end_us as f64;
        let is_late = at > LEFT + WIDTH * 0.8;
        put(format_args!(
            "<line x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{TOP}\" y2=\"{bottom}\" stroke=\"#444\" \
             stroke-dasharray=\"4 3\"/><text x=\"{:.1}\" y=\"{}\" text-anchor=\"{}\" \
             font-size=\"11\">{}</text>",
            if is_late { at - 4.0 } else { at + 4.0 },
            // Those of one moment are below each other.
            TOP + 12.0 + 13.0 * (index % 6) as f64,
            if is_late { "end" } else { "start" },
            moment.what
        ));
    }
    for (index, pages) in all.iter().enumerate() {
        let at = LEFT + WIDTH * index as f64 / AREAS as f64;
        let (name, colour) = area(index);
        put(format_args!(
            "<rect x=\"{at:.1}\" y=\"{}\" width=\"12\" height=\"12\" fill=\"{colour}\"/>\
             <text x=\"{:.1}\" y=\"{}\">{name} ({pages} pages)</text>",
            bottom + 46.0,
            at + 18.0,
            bottom + 57.0
        ));
    }
    for (index, line) in figures.iter().enumerate() {
        put(format_args!(
            "<text x=\"{LEFT}\" y=\"{}\">{}</text>",
            bottom + 60.0 + LINE * (index + 1) as f64,
            escape(line)
        ));
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

    fn draw(events: &[TimelineEvent], total_pages: u64, moments: &[Moment]) -> String {
        let figures = ["source: 3 reads".to_string()];
        svg(&Picture { title: "1 < 2", events, total_pages, moments, figures: &figures })
    }

    #[test]
    fn each_used_path_has_its_colour() {
        let event = |at_us, pages, path| TimelineEvent { at_us, pages, path, expected: pages };
        let events = [event(10, 3, FaultPath::Guest), event(500, 512, FaultPath::BackEnd)];
        let svg = draw(&events, 1024, &[]);
        assert!(svg.contains("1 &lt; 2"));
        assert_eq!(svg.matches("<polygon").count(), 2);
        for path in [FaultPath::Guest, FaultPath::BackEnd] {
            assert_eq!(svg.matches(colour(path)).count(), 2, "area and legend");
        }
        assert!(svg.contains("back_end (512 pages)"));
        assert!(svg.contains("working_set (0 pages)"), "faults are not replayed");
        assert!(svg.contains("source: 3 reads"));
    }

    #[test]
    fn replayed_pages_have_their_area() {
        let path = FaultPath::Fill;
        let events = [TimelineEvent { at_us: 10, pages: 64, path, expected: 40 }];
        let svg = draw(&events, 64, &[]);
        assert!(svg.contains("fill (24 pages)") && svg.contains("working_set (40 pages)"));
        assert_eq!(svg.matches("<polygon").count(), 2);
    }

    #[test]
    fn axes_have_units() {
        let event = |at_us| TimelineEvent { at_us, pages: 1, path: FaultPath::Guest, expected: 0 };
        let late = Moment { at_us: 8_000_000, what: "source fails" };
        let svg = draw(&[event(4_000_000)], 64 << 8, &[late]);
        for label in [">32 MiB<", ">64 MiB<", ">2.0 s<", ">8.0 s<", ">source fails<"] {
            assert!(svg.contains(label), "{label}: {svg}");
        }
        let svg = draw(&[event(40_000)], 4 << 18, &[]);
        assert!(svg.contains(">3 GiB<") && svg.contains(">10.0 ms<"), "{svg}");
        let svg = draw(&[event(400)], 4, &[]);
        assert!(svg.contains(">4 KiB<") && svg.contains(">100 us<"), "{svg}");
    }

    #[test]
    fn nothing_at_all_can_be_drawn() {
        assert!(draw(&[], 0, &[]).ends_with("</svg>\n"));
    }
}
