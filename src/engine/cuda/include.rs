//! Puts kernels' text together.

/// `text` with each `#include "name"` replaced by the header of that name the first time, and dropped after that
/// (headers may include too). Folders in `name` are for other compilers' sake: the last part counts. Messages of the
/// compiler speak of the files as they were.
///
/// # Errors
/// In words: a header that is not there.
pub(super) fn assemble(file: &str, text: &str, headers: &[(&str, &str)]) -> Result<String, String> {
    let mut out = String::with_capacity(text.len());
    add(file, text, headers, &mut Vec::new(), &mut out)?;
    Ok(out)
}

fn add<'a>(
    file: &str,
    text: &str,
    headers: &[(&'a str, &'a str)],
    included: &mut Vec<&'a str>,
    out: &mut String,
) -> Result<(), String> {
    out.push_str(&format!("#line 1 \"{file}\"\n"));
    for (number, line) in text.lines().enumerate() {
        let directive = line.trim();
        if directive == "#pragma once" {
            // Every header comes once, and the compiler sees one file.
            out.push('\n');
            continue;
        }
        let Some(path) = directive.strip_prefix("#include \"").and_then(|rest| rest.strip_suffix('"')) else {
            out.push_str(line);
            out.push('\n');
            continue;
        };
        let name = path.rsplit('/').next().unwrap_or(path);
        let &(name, header) = headers
            .iter()
            .find(|(known, _)| *known == name)
            .ok_or_else(|| format!("{file}, line {}: no header {path:?}", number + 1))?;
        if !included.contains(&name) {
            included.push(name);
            add(name, header, headers, included, out)?;
        }
        out.push_str(&format!("#line {} \"{file}\"\n", number + 2));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::assemble;

    #[test]
    fn headers_come_once_and_keep_their_lines() {
        let headers = [("low.cuh", "#pragma once\nlow\n"), ("high.cuh", "#include \"low.cuh\"\nhigh\n")];
        let text = "#include \"../common/high.cuh\"\n#include \"low.cuh\"\nmain\n";
        let expected = "#line 1 \"a.cu\"\n#line 1 \"high.cuh\"\n#line 1 \"low.cuh\"\n\nlow\n#line 2 \"high.cuh\"\nhigh\n\
                        #line 2 \"a.cu\"\n#line 3 \"a.cu\"\nmain\n";
        assert_eq!(assemble("a.cu", text, &headers).as_deref(), Ok(expected));
        let error = assemble("a.cu", "x\n#include \"gone.cuh\"\n", &headers);
        assert_eq!(error, Err("a.cu, line 2: no header \"gone.cuh\"".into()));
    }
}
