//! Plain tables on standard output.

/// Prints `rows` under `headers`: the first column to the left, all others to the right.
pub fn print(headers: &[&str], rows: &[Vec<String>]) {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|r| r.get(column)).map(|c| c.chars().count());
        cells.chain(headers.get(column).map(|h| h.chars().count())).max().unwrap_or(0)
    };
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let padded: Vec<String> = cells
            .enumerate()
            .map(|(i, cell)| match i {
                0 => format!("{cell:<w$}", w = width(0)),
                _ => format!("{cell:>w$}", w = width(i)),
            })
            .collect();
        println!("{}", padded.join("  ").trim_end());
    };
    line(&mut headers.iter().copied());
    for row in rows {
        line(&mut row.iter().map(String::as_str));
    }
}
