//! Time and part of the byte bound against length, as SVG.

use super::figure::{Figure, Report, Table, count, time};
use super::peers::DEVICE;
use super::support::outcome::Outcome;
use plotters::coord::ranged1d::{KeyPointHint, NoDefaultFormatting, Ranged, ValueFormatter};
use plotters::prelude::*;
use std::ops::Range;
use std::path::Path;

const COLOURS: [RGBColor; 6] = [
    RGBColor(60, 60, 60),
    RGBColor(0, 110, 190),
    RGBColor(215, 95, 0),
    RGBColor(0, 140, 90),
    RGBColor(150, 60, 160),
    RGBColor(190, 40, 60),
];

/// One line: its colour is what ran, its dashes are where.
struct Line {
    name: String,
    colour: usize,
    device: usize,
    points: Vec<(f64, f64)>,
}

/// Draws all that the report has figures for.
pub fn draw(report: &Report, folder: &Path) -> Outcome<()> {
    let mut heads: Vec<_> = report.of(Table::Decode).map(|f| f.case.heads).collect();
    heads.sort_unstable();
    heads.dedup();
    for (q, kv) in heads {
        let of = |f: &&Figure| f.case.table == Table::Decode && f.case.heads == (q, kv);
        let title = format!("Decoding one token, {q}/{kv} heads, bf16");
        let lines = lines(report, of, Figure::seconds);
        chart(folder, &format!("decode-{q}-{kv}"), &title, "keys", Axis::Seconds, &lines)?;
        let lines = self::lines(report, |f| of(f) && f.case.device != DEVICE, Figure::fraction);
        chart(folder, &format!("decode-{q}-{kv}-bound"), &title, "keys", Axis::Fraction, &lines)?;
    }
    for stage in ["forward", "backward"] {
        for dtype in ["bf16", "f32"] {
            let of = |f: &&Figure| {
                let case = &f.case;
                case.table == Table::Race && case.stage == stage && case.dtype == dtype
            };
            let title = format!("RACE {stage}, {dtype}");
            let file = format!("race-{stage}-{dtype}");
            chart(folder, &file, &title, "tokens", Axis::Seconds, &lines(report, of, Figure::seconds))?;
            let lines = lines(report, |f| of(f) && f.case.device != DEVICE, Figure::fraction);
            chart(folder, &format!("{file}-bound"), &title, "tokens", Axis::Fraction, &lines)?;
        }
    }
    Ok(())
}

fn lines(report: &Report, of: impl Fn(&&Figure) -> bool, value: impl Fn(&Figure) -> Option<f64>) -> Vec<Line> {
    let mut lines: Vec<Line> = Vec::new();
    let mut whats: Vec<&str> = Vec::new();
    let places: Vec<&str> = report.devices.iter().map(|d| d.asked.as_str()).chain([DEVICE]).collect();
    for figure in report.figures.iter().filter(&of) {
        let (what, place) = (figure.case.what.as_str(), figure.case.device.as_str());
        if !whats.contains(&what) {
            whats.push(what);
        }
        let Some(value) = value(figure) else { continue };
        let name = format!("{what}, {place}");
        let point = (figure.case.tokens as f64, value);
        match lines.iter_mut().find(|line| line.name == name) {
            Some(line) => line.points.push(point),
            None => {
                let colour = whats.iter().position(|w| *w == what).unwrap_or(0);
                let device = places.iter().position(|p| *p == place).unwrap_or(0);
                lines.push(Line { name, colour, device, points: vec![point] });
            }
        }
    }
    lines.iter_mut().for_each(|line| line.points.sort_by(|a, b| a.0.total_cmp(&b.0)));
    lines
}

#[derive(Clone, Copy, PartialEq)]
enum Axis {
    Seconds,
    Fraction,
}

/// A logarithmic axis with marks at powers of `base`, and what is written there.
struct Log {
    range: Range<f64>,
    base: f64,
    label: fn(f64) -> String,
}

impl Ranged for Log {
    type FormatOption = NoDefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, limit: (i32, i32)) -> i32 {
        let part = (value / self.range.start).ln() / (self.range.end / self.range.start).ln();
        limit.0 + (part * f64::from(limit.1 - limit.0)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, _: Hint) -> Vec<f64> {
        let exponent = |x: f64| x.ln() / self.base.ln();
        let (first, last) = (exponent(self.range.start).ceil() as i32, exponent(self.range.end).floor() as i32);
        (first..=last).map(|power| self.base.powi(power)).collect()
    }

    fn range(&self) -> Range<f64> {
        self.range.clone()
    }
}

impl ValueFormatter<f64> for Log {
    fn format_ext(&self, value: &f64) -> String {
        (self.label)(*value)
    }
}

fn bounds(values: impl Iterator<Item = f64> + Clone, base: f64) -> Range<f64> {
    let (low, high) = (values.clone().fold(f64::MAX, f64::min), values.fold(0.0, f64::max));
    let power = |x: f64| x.ln() / base.ln();
    // One mark between them at least.
    base.powf((power(low) - 0.05).floor())..base.powf((power(high) + 0.05).ceil())
}

/// Draws nothing where there are no lines.
fn chart(folder: &Path, file: &str, title: &str, x: &str, axis: Axis, lines: &[Line]) -> Outcome<()> {
    if lines.is_empty() {
        return Ok(());
    }
    let path = folder.join(format!("{file}.svg"));
    let root = SVGBackend::new(&path, (900, 560)).into_drawing_area();
    root.fill(&WHITE)?;
    let (plot, legend) = root.split_horizontally(680);
    let points = lines.iter().flat_map(|line| line.points.iter());
    let (low, high) = points.clone().fold((f64::MAX, 0f64), |(low, high), p| (low.min(p.0), high.max(p.0)));
    let across = Log { range: low / 1.2..high * 1.2, base: 2.0, label: |n| count(n.round() as u64) };
    let (y, up) = match axis {
        Axis::Seconds => (
            "time, median",
            Log { range: bounds(points.map(|p| p.1), 10.0), base: 10.0, label: |s| round(time(s * 1.0000001)) },
        ),
        Axis::Fraction => {
            let range = bounds(points.map(|p| p.1.min(1.0)), 2.0);
            ("part of the byte bound", Log { range, base: 2.0, label: percent })
        }
    };
    let mut chart = ChartBuilder::on(&plot)
        .caption(title, ("sans-serif", 23))
        .margin(14)
        .x_label_area_size(48)
        .y_label_area_size(84)
        .build_cartesian_2d(across, up)?;
    let grid = RGBColor(225, 225, 225);
    chart
        .configure_mesh()
        .x_desc(x)
        .y_desc(y)
        .label_style(("sans-serif", 16))
        .axis_desc_style(("sans-serif", 17))
        .bold_line_style(grid)
        .light_line_style(WHITE)
        .draw()?;
    for (i, line) in lines.iter().enumerate() {
        let style = COLOURS[line.colour % COLOURS.len()].stroke_width(2);
        let (size, space) = dashes(line.device);
        chart.draw_series(DashedLineSeries::new(line.points.iter().copied(), size, space, style))?;
        let dots = line.points.iter().map(|&point| Circle::new(point, 3, style.filled()));
        chart.draw_series(dots)?;
        // The names beside the plot, where they hide no line.
        let at = 46 + 22 * i as i32;
        let mut from = 4;
        while from < 40 {
            let to = (from + size as i32).min(40);
            legend.draw(&PathElement::new(vec![(from, at), (to, at)], style))?;
            from = to + space as i32;
        }
        legend.draw(&Text::new(line.name.clone(), (48, at - 8), ("sans-serif", 16)))?;
    }
    root.present()?;
    Ok(())
}

/// 12.5 and 50, not 12.500 and 50.000.
fn percent(fraction: f64) -> String {
    let text = format!("{:.3}", fraction * 100.0);
    format!("{}%", text.trim_end_matches('0').trim_end_matches('.'))
}

/// 10.0 µs as 10 µs.
fn round(text: String) -> String {
    text.replace(".00 ", " ").replace(".0 ", " ")
}

/// Length of a dash and of the space after it, by device.
fn dashes(device: usize) -> (u32, u32) {
    [(1000, 0), (9, 5), (3, 4), (14, 8)][device % 4]
}
