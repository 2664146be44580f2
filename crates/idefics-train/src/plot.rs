//! The curves of a run as a PNG: losses, learning rate and gradient norm over steps, one panel each.
//!
//! Three line charts with numbers at their axes: pixels are drawn here, since the crates for charts bring font
//! rendering of the system with them.

use std::{fs::File, io::BufWriter, path::Path};

use font8x8::UnicodeFonts;

use crate::{TrainError, error::io_error, metrics::Record};

const WIDTH: usize = 960;
const PANEL_HEIGHT: usize = 240;
/// Room around the lines of a panel: left, right, top, bottom.
const MARGINS: [usize; 4] = [88, 24, 28, 28];
const LETTER: usize = 8;
/// Losses of how many steps count in the smooth line, about.
const SMOOTH: f64 = 20.0;

const WHITE: [u8; 3] = [255, 255, 255];
const GREY: [u8; 3] = [225, 225, 225];
const BLACK: [u8; 3] = [40, 40, 40];
const PALE: [u8; 3] = [190, 210, 235];
const BLUE: [u8; 3] = [31, 90, 160];
const RED: [u8; 3] = [200, 50, 40];

/// A line of a panel.
struct Line {
    name: &'static str,
    colour: [u8; 3],
    /// Step and value.
    points: Vec<(f64, f64)>,
    has_marks: bool,
}

/// Draws what the records say into a file.
pub fn write_curves(path: &Path, records: &[Record]) -> Result<(), TrainError> {
    let panels = panels(records);
    let mut canvas = Canvas::new(WIDTH, PANEL_HEIGHT * panels.len());
    for (index, lines) in panels.iter().enumerate() {
        canvas.panel(index * PANEL_HEIGHT, lines);
    }
    let partial = path.with_extension("png.partial");
    let file = File::create(&partial).map_err(io_error("create", &partial))?;
    let mut encoder = png::Encoder::new(BufWriter::new(file), canvas.width as u32, canvas.height as u32);
    encoder.set_color(png::ColorType::Rgb);
    encoder
        .write_header()
        .and_then(|mut writer| {
            writer.write_image_data(&canvas.pixels)?;
            writer.finish()
        })
        .map_err(|error| io_error("write", &partial)(std::io::Error::other(error)))?;
    std::fs::rename(&partial, path).map_err(io_error("rename", &partial))
}

fn panels(records: &[Record]) -> Vec<Vec<Line>> {
    let steps: Vec<_> = records
        .iter()
        .filter_map(|record| if let Record::Step(step) = record { Some(step) } else { None })
        .collect();
    let evaluations = records.iter().filter_map(|record| match record {
        Record::Evaluation(record) => Some((record.step as f64, record.loss)),
        _ => None,
    });
    let of = |value: fn(&crate::metrics::StepRecord) -> f64| -> Vec<(f64, f64)> {
        steps.iter().map(|record| (record.step as f64, value(record))).collect()
    };
    let loss = of(|record| record.loss);
    let line = |name, colour, points| Line { name, colour, points, has_marks: false };
    let held_out =
        Line { name: "held-out loss", colour: RED, points: evaluations.collect(), has_marks: true };
    vec![
        vec![line("", PALE, loss.clone()), line("loss", BLUE, smooth(&loss)), held_out],
        vec![line("learning rate", BLUE, of(|record| record.learning_rate))],
        vec![line("gradient norm", BLUE, of(|record| record.gradient_norm))],
    ]
}

/// A running mean that begins at the first value.
fn smooth(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let mut mean = None;
    let next = |&(x, y): &(f64, f64)| {
        let value: f64 = mean.map_or(y, |mean: f64| mean + (y - mean) / SMOOTH);
        mean = Some(value);
        (x, value)
    };
    points.iter().map(next).collect()
}

struct Canvas {
    width: usize,
    height: usize,
    /// `[height, width, 3]`.
    pixels: Vec<u8>,
}

/// From numbers to pixels.
struct Scale {
    from: [f64; 2],
    to: [f64; 2],
}

impl Scale {
    /// Numbers of `values` onto `to`; nothing if there are none.
    fn new(values: impl Iterator<Item = f64>, to: [f64; 2]) -> Option<Self> {
        let range =
            values.filter(|value| value.is_finite()).fold(
                None,
                |range: Option<[f64; 2]>, value| match range {
                    None => Some([value, value]),
                    Some([low, high]) => Some([f64::min(low, value), f64::max(high, value)]),
                },
            );
        let [low, high] = range?;
        let room = if high > low { 0.0 } else { high.abs().max(1.0) * 0.5 };
        Some(Self { from: [low - room, high + room], to })
    }

    fn at(&self, value: f64) -> f64 {
        let share = (value - self.from[0]) / (self.from[1] - self.from[0]);
        self.to[0] + share * (self.to[1] - self.to[0])
    }

    /// The number at a share of the range.
    fn value(&self, share: f64) -> f64 {
        self.from[0] + share * (self.from[1] - self.from[0])
    }
}

impl Canvas {
    fn new(width: usize, height: usize) -> Self {
        Self { width, height, pixels: WHITE.repeat(width * height) }
    }

    fn panel(&mut self, top: usize, lines: &[Line]) {
        let [left, right, above, below] = MARGINS;
        let (x0, x1) = (left, self.width - right);
        let (y0, y1) = (top + above, top + PANEL_HEIGHT - below);
        let points = || lines.iter().flat_map(|line| &line.points);
        let horizontal = Scale::new(points().map(|point| point.0), [x0 as f64, x1 as f64]);
        let vertical = Scale::new(points().map(|point| point.1), [y1 as f64, y0 as f64]);
        let mut at = x0;
        for line in lines.iter().filter(|line| !line.name.is_empty()) {
            self.text(at, top + 8, line.name, line.colour);
            at += (line.name.len() + 3) * LETTER;
        }
        let (Some(horizontal), Some(vertical)) = (horizontal, vertical) else { return };
        for tick in 0..=4 {
            let share = f64::from(tick) / 4.0;
            let y = vertical.at(vertical.value(share));
            self.segment([x0 as f64, y], [x1 as f64, y], GREY);
            let label = short(vertical.value(share));
            let width = (label.len() + 1) * LETTER;
            self.text(x0.saturating_sub(width), y as usize - LETTER / 2, &label, BLACK);
            let x = horizontal.at(horizontal.value(share));
            let label = format!("{:.0}", horizontal.value(share));
            self.text((x as usize).saturating_sub(label.len() * LETTER / 2), y1 + 10, &label, BLACK);
        }
        for line in lines {
            let place = |point: &(f64, f64)| [horizontal.at(point.0), vertical.at(point.1)];
            let finite: Vec<_> = line.points.iter().filter(|point| point.1.is_finite()).collect();
            for pair in finite.windows(2) {
                self.segment(place(pair[0]), place(pair[1]), line.colour);
            }
            for point in finite.iter().filter(|_| line.has_marks || finite.len() == 1) {
                let [x, y] = place(point);
                for dy in -2..=2 {
                    let y = y + f64::from(dy);
                    self.segment([x - 2.0, y], [x + 2.0, y], line.colour);
                }
            }
        }
    }

    fn segment(&mut self, from: [f64; 2], to: [f64; 2], colour: [u8; 3]) {
        let (dx, dy) = (to[0] - from[0], to[1] - from[1]);
        let steps = dx.abs().max(dy.abs()).ceil().max(1.0);
        for step in 0..=steps as usize {
            let share = step as f64 / steps;
            self.dot((from[0] + share * dx).round(), (from[1] + share * dy).round(), colour);
        }
    }

    fn text(&mut self, x: usize, y: usize, text: &str, colour: [u8; 3]) {
        for (index, letter) in text.chars().enumerate() {
            let rows = font8x8::BASIC_FONTS.get(letter).unwrap_or_default();
            for (row, bits) in rows.into_iter().enumerate() {
                for column in (0..LETTER).filter(|column| bits >> column & 1 == 1) {
                    self.dot((x + index * LETTER + column) as f64, (y + row) as f64, colour);
                }
            }
        }
    }

    fn dot(&mut self, x: f64, y: f64, colour: [u8; 3]) {
        let is_inside = x >= 0.0 && y >= 0.0 && x < self.width as f64 && y < self.height as f64;
        if is_inside {
            let first = (y as usize * self.width + x as usize) * 3;
            self.pixels[first..first + 3].copy_from_slice(&colour);
        }
    }
}

/// A number with four digits that count.
fn short(value: f64) -> String {
    if value == 0.0 || (1e-3..1e5).contains(&value.abs()) {
        let digits = (3 - value.abs().max(1e-3).log10().floor() as i32).clamp(0, 5) as usize;
        format!("{value:.digits$}")
    } else {
        format!("{value:.1e}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::{EvaluationRecord, StepRecord};

    #[test]
    fn numbers_are_short() {
        for (value, expected) in [
            (0.0, "0.00000"),
            (1.5, "1.500"),
            (123.456, "123.5"),
            (2e-5, "2.0e-5"),
            (0.012_34, "0.01234"),
            (-7.0, "-7.000"),
        ] {
            assert_eq!(short(value), expected);
        }
    }

    /// Lines go from corner to corner, numbers that are none are left out, and nothing is drawn outside.
    #[test]
    fn curves_are_drawn_where_they_belong() {
        let step = |step: u64, loss: f64| {
            Record::Step(StepRecord {
                step,
                loss,
                z: 0.0,
                accuracy: 0.0,
                gradient_norm: 1.0,
                learning_rate: step as f64,
                tokens: 1,
                targets: 1,
                images: 0,
                seconds: 1.0,
                data_seconds: 0.0,
            })
        };
        let evaluation = EvaluationRecord { step: 5, loss: 3.0, accuracy: 0.0, targets: 1, seconds: 0.0 };
        let mut records: Vec<Record> = (1..=9).map(|n| step(n, 10.0 - n as f64)).collect();
        records.push(step(10, f64::NAN));
        records.push(Record::Evaluation(evaluation));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("curves.png");
        write_curves(&path, &records).unwrap();
        let decoder = png::Decoder::new(std::io::BufReader::new(File::open(&path).unwrap()));
        let mut reader = decoder.read_info().unwrap();
        let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
        reader.next_frame(&mut pixels).unwrap();
        let at = |x: usize, y: usize| {
            let first = (y * WIDTH + x) * 3;
            [pixels[first], pixels[first + 1], pixels[first + 2]]
        };
        // The learning rate is a straight line through the second panel.
        let [left, right, above, below] = MARGINS;
        assert_eq!(at(left, 2 * PANEL_HEIGHT - below), BLUE);
        assert_eq!(at(WIDTH - right, PANEL_HEIGHT + above), BLUE);
        let reds = pixels.chunks_exact(3).filter(|pixel| **pixel == RED).count();
        assert!(reds > 25, "{reds}");
        write_curves(&path, &[]).unwrap();
    }
}
