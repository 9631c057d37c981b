//! Accuracy curves as an SVG file.

use crate::Curve;
use plotters::prelude::*;
use std::path::Path;

const COLOURS: [RGBColor; 4] =
    [RGBColor(40, 40, 40), RGBColor(0, 110, 190), RGBColor(215, 95, 0), RGBColor(0, 140, 90)];

/// Draws the mean over seeds of every arm, and each seed thinly.
pub fn draw(path: &Path, title: &str, arms: &[(String, Vec<Curve>)]) -> crate::Result<()> {
    let root = SVGBackend::new(path, (820, 480)).into_drawing_area();
    root.fill(&WHITE)?;
    let steps = arms.iter().flat_map(|(_, curves)| curves).flat_map(|c| &c.points).map(|p| p.step).max().unwrap_or(1);
    let mut chart = ChartBuilder::on(&root)
        .caption(title, ("sans-serif", 18))
        .margin(14)
        .x_label_area_size(38)
        .y_label_area_size(48)
        .build_cartesian_2d(0..steps, 0.0..1.0)?;
    chart.configure_mesh().x_desc("steps").y_desc("accuracy on unseen sequences").light_line_style(WHITE).draw()?;
    for ((name, curves), colour) in arms.iter().zip(COLOURS.iter().cycle()) {
        for curve in curves {
            let points = curve.points.iter().map(|p| (p.step, p.accuracy));
            chart.draw_series(LineSeries::new(points, colour.mix(0.25)))?;
        }
        let mean = crate::mean(curves).into_iter().map(|p| (p.step, p.accuracy));
        chart
            .draw_series(LineSeries::new(mean, colour.stroke_width(3)))?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(3)));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::MiddleRight)
        .background_style(WHITE.mix(0.8))
        .border_style(RGBColor(200, 200, 200))
        .draw()?;
    root.present()?;
    Ok(())
}
