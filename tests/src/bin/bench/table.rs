// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Figures, their references, and the verdicts on them.

use serde::{Deserialize, Serialize};

use crate::run::median;

/// The condition for a figure.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Target {
    /// At most this multiple of the reference.
    RatioAtMost(f64),
    /// At least this multiple of the reference.
    RatioAtLeast(f64),
    /// At most this amount above the reference.
    AtMostMore(f64),
    /// At most this value; the reference, if any, is for information.
    AtMost(f64),
}

impl Target {
    fn is_met(self, figure: f64, reference: Option<f64>, ratio: Option<f64>) -> Option<bool> {
        let ratio = || Some(ratio.unwrap_or(figure / reference?));
        Some(match self {
            Target::RatioAtMost(limit) => ratio()? <= limit,
            Target::RatioAtLeast(limit) => ratio()? >= limit,
            Target::AtMostMore(limit) => figure <= limit + reference?,
            Target::AtMost(limit) => figure <= limit,
        })
    }

    fn text(self) -> String {
        match self {
            Target::RatioAtMost(limit) => format!("<= x{limit:.2}"),
            Target::RatioAtLeast(limit) => format!(">= x{limit:.2}"),
            Target::AtMostMore(limit) => format!("<= +{limit:.0}"),
            Target::AtMost(limit) => format!("<= {limit}"),
        }
    }
}

/// The verdict on a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Verdict {
    Met,
    Missed,
    /// No target: the row explains others.
    #[serde(rename = "-")]
    None,
    /// Not measurable; `note` gives the reason.
    Unavailable,
}

impl Verdict {
    const fn name(self) -> &'static str {
        match self {
            Verdict::Met => "met",
            Verdict::Missed => "missed",
            Verdict::None => "-",
            Verdict::Unavailable => "unavailable",
        }
    }
}

/// One comparison.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Row {
    /// `restore`, `lab`, `host` or `crates`.
    pub part: String,
    /// The measured quantity.
    pub name: String,
    /// The unit.
    pub unit: String,
    /// The project's figure.
    pub figure: Option<f64>,
    /// Description of the reference.
    pub reference_is: String,
    /// The reference's figure.
    pub reference: Option<f64>,
    /// The figure divided by the reference.
    pub ratio: Option<f64>,
    /// The target, if any.
    pub target: Option<Target>,
    /// The resulting verdict.
    pub verdict: Verdict,
    /// A note on the figure's interpretation.
    pub note: String,
}

impl Row {
    /// Creates a row for a figure without a reference.
    pub(crate) fn new(part: &str, name: impl Into<String>, unit: &str, figure: f64) -> Self {
        Row {
            part: part.into(),
            name: name.into(),
            unit: unit.into(),
            figure: Some(figure),
            reference_is: String::new(),
            reference: None,
            ratio: None,
            target: None,
            verdict: Verdict::None,
            note: String::new(),
        }
    }

    /// Creates a row for a figure that cannot be measured, with the reason.
    pub(crate) fn unavailable(part: &str, name: impl Into<String>, why: impl ToString) -> Self {
        let why = why.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
        let row = Row::new(part, name, "", 0.0);
        Row { figure: None, verdict: Verdict::Unavailable, note: why, ..row }
    }

    pub(crate) fn against(mut self, reference_is: &str, reference: f64) -> Self {
        self.reference_is = reference_is.into();
        self.reference = Some(reference);
        self.ratio = self.figure.map(|figure| figure / reference).filter(|ratio| ratio.is_finite());
        self.judged()
    }

    /// Compares figures with references that were measured in pairs, each right after the other: the
    /// ratio is the median of the pairs' ratios, because a machine's speed changes between pairs.
    pub(crate) fn of_pairs(
        part: &str,
        name: impl Into<String>,
        unit: &str,
        reference_is: &str,
        pairs: &[(f64, f64)],
    ) -> Self {
        let median_of = |value: fn(&(f64, f64)) -> f64| {
            median(&mut pairs.iter().map(value).collect::<Vec<_>>())
        };
        let row = Row::new(part, name, unit, median_of(|pair| pair.0));
        let row = row.against(reference_is, median_of(|pair| pair.1));
        let ratio = median_of(|pair| pair.0 / pair.1);
        Row { ratio: Some(ratio).filter(|ratio| ratio.is_finite()), ..row }
    }

    pub(crate) fn target(mut self, target: Target) -> Self {
        self.target = Some(target);
        self.judged()
    }

    pub(crate) fn note(mut self, note: &str) -> Self {
        self.note = note.into();
        self
    }

    fn judged(mut self) -> Self {
        let met = self
            .target
            .zip(self.figure)
            .and_then(|(target, figure)| target.is_met(figure, self.reference, self.ratio));
        self.verdict = match met {
            None => Verdict::None,
            Some(true) => Verdict::Met,
            Some(false) => Verdict::Missed,
        };
        self
    }
}

/// Formats a figure with at least three digits, and no insignificant ones.
fn number(value: Option<f64>) -> String {
    match value {
        None => String::new(),
        Some(value) if value.abs() >= 100.0 => format!("{value:.0}"),
        Some(value) if value.abs() >= 1.0 => format!("{value:.2}"),
        Some(value) => format!("{value:.4}"),
    }
}

/// Prints all rows as a table.
pub(crate) fn print(rows: &[Row]) {
    let width = rows.iter().map(|row| row.name.chars().count()).max().unwrap_or(0).max(6);
    println!(
        "{:<7} {:<width$} {:>10} {:>10} {:>6} {:>9} {:<11} unit; reference",
        "part", "figure", "ours", "reference", "ratio", "target", "verdict"
    );
    for row in rows {
        let ratio = row.ratio.map(|ratio| format!("{ratio:.2}")).unwrap_or_default();
        let target = row.target.map(Target::text).unwrap_or_default();
        let about = [&row.unit, &row.reference_is, &row.note]
            .into_iter()
            .filter(|text| !text.is_empty())
            .map(String::as_str)
            .collect::<Vec<_>>()
            .join("; ");
        println!(
            "{:<7} {:<width$} {:>10} {:>10} {:>6} {:>9} {:<11} {about}",
            row.part,
            row.name,
            number(row.figure),
            number(row.reference),
            ratio,
            target,
            row.verdict.name()
        );
    }
    let count = |verdict| rows.iter().filter(|row| row.verdict == verdict).count();
    println!(
        "\n{} met, {} missed, {} unavailable",
        count(Verdict::Met),
        count(Verdict::Missed),
        count(Verdict::Unavailable)
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_verdict_follows_from_the_numbers() {
        let row = |figure| Row::new("lab", "x", "ns", figure);
        let verdict = |figure: f64, target| row(figure).against("y", 100.0).target(target).verdict;
        assert_eq!(verdict(115.0, Target::RatioAtMost(1.15)), Verdict::Met);
        assert_eq!(verdict(116.0, Target::RatioAtMost(1.15)), Verdict::Missed);
        assert_eq!(verdict(75.0, Target::RatioAtLeast(0.75)), Verdict::Met);
        assert_eq!(verdict(74.0, Target::RatioAtLeast(0.75)), Verdict::Missed);
        assert_eq!(verdict(600.0, Target::AtMostMore(500.0)), Verdict::Met);
        assert_eq!(verdict(601.0, Target::AtMostMore(500.0)), Verdict::Missed);
        assert_eq!(row(0.2).target(Target::AtMost(0.1)).verdict, Verdict::Missed);
        // Of pairs, the ratio counts: this machine became slower for the last one.
        let pairs = [(100.0, 100.0), (104.0, 100.0), (300.0, 290.0)];
        let of_pairs = Row::of_pairs("host", "x", "ns", "y", &pairs);
        assert_eq!(of_pairs.ratio, Some(300.0 / 290.0));
        assert_eq!(of_pairs.target(Target::RatioAtMost(1.035)).verdict, Verdict::Met);
        // Without its reference there is no verdict.
        assert_eq!(row(1.0).target(Target::RatioAtMost(1.0)).verdict, Verdict::None);
        // Not a number is not a success.
        assert_eq!(verdict(f64::NAN, Target::RatioAtMost(1.0)), Verdict::Missed);
    }
}
