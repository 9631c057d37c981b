//! Puts shader text together.

use crate::tensor::DType;

/// The word that tells a text the element type of what it calls `prefix`: `KV`, `Q`, `IN`, `IN2` or `OUT`.
pub(crate) fn dtype_define(prefix: &'static str, dtype: DType) -> &'static str {
    let [f16, bf16, f32] = match prefix {
        "KV" => ["KV_F16", "KV_BF16", "KV_F32"],
        "Q" => ["Q_F16", "Q_BF16", "Q_F32"],
        "IN" => ["IN_F16", "IN_BF16", "IN_F32"],
        "IN2" => ["IN2_F16", "IN2_BF16", "IN2_F32"],
        _ => ["OUT_F16", "OUT_BF16", "OUT_F32"],
    };
    match dtype {
        DType::F16 => f16,
        DType::Bf16 => bf16,
        _ => f32,
    }
}

/// Assembles shader text from a main part and shared snippets.
///
/// Directives stand on lines of their own: `#import name` is replaced by the snippet of that name the first time
/// and dropped after that (snippets may import too), `#ifdef X`, `#ifndef X`, `#else` and `#endif` keep or drop
/// lines and may be nested. `#import name word` is a snippet of its own, where `$n` in the text is the word: what
/// there is twice, of two bindings, is written once; without a word `$n` is nothing. `#repeat x N` writes the lines
/// down to its `#end` N times (a number or a constant), with `$x` replaced by 0, 1 and so on: compilers keep what is
/// indexed by literals in registers. Constants come first, as `const NAME: u32 = ..u;`. `enable` directives, which
/// WGSL wants before everything else, are moved to the front.
pub(crate) struct Assembler;

impl Assembler {
    /// # Errors
    /// In words: an unknown import or directive, a conditional without its end or beginning.
    pub fn assemble(
        main: &str,
        snippets: &[(&str, &str)],
        defines: &[&str],
        constants: &[(&str, u32)],
    ) -> Result<String, String> {
        let mut text = Text { snippets, defines, imported: Vec::new(), enables: String::new(), body: String::new() };
        text.add("main", main)?;
        let mut out = text.enables;
        for (name, value) in constants {
            out.push_str(&format!("const {name}: u32 = {value}u;\n"));
        }
        repeat(&text.body, constants, &mut out)?;
        Ok(out)
    }
}

struct Text<'a> {
    snippets: &'a [(&'a str, &'a str)],
    defines: &'a [&'a str],
    /// Names and words.
    imported: Vec<(&'a str, String)>,
    enables: String,
    body: String,
}

/// One `#ifdef` that is open.
struct Open {
    /// Whether lines are kept here, as far as this conditional decides.
    keep: bool,
    has_else: bool,
}

impl<'a> Text<'a> {
    fn add(&mut self, part: &str, source: &str) -> Result<(), String> {
        let mut open: Vec<Open> = Vec::new();
        for (number, line) in source.lines().enumerate() {
            let at = |what: &str| format!("{part}, line {}: {what}", number + 1);
            let keep = open.iter().all(|o| o.keep);
            let trimmed = line.trim();
            let Some(directive) = trimmed.strip_prefix('#') else {
                match trimmed.strip_prefix("enable ") {
                    _ if !keep => {}
                    Some(_) if self.enables.contains(trimmed) => {}
                    Some(_) => self.enables.push_str(&format!("{trimmed}\n")),
                    None => self.body.push_str(&format!("{line}\n")),
                }
                continue;
            };
            let mut words = directive.split_whitespace();
            let directive = words.next().unwrap_or_default();
            let argument = words.next();
            let word = words.next();
            let most = if matches!(directive, "import" | "repeat") { 2 } else { 1 };
            if word.is_some() && most == 1 || words.next().is_some() {
                return Err(at(&format!("more words after the directive than {most}")));
            }
            match (directive, argument) {
                ("ifdef", Some(name)) => open.push(Open { keep: self.defines.contains(&name), has_else: false }),
                ("ifndef", Some(name)) => open.push(Open { keep: !self.defines.contains(&name), has_else: false }),
                ("else", None) => match open.last_mut() {
                    Some(last) if !last.has_else => {
                        last.keep = !last.keep;
                        last.has_else = true;
                    }
                    Some(_) => return Err(at("a second #else")),
                    None => return Err(at("#else without #ifdef")),
                },
                ("endif", None) => {
                    open.pop().ok_or_else(|| at("#endif without #ifdef"))?;
                }
                ("import", Some(name)) if keep => self.import(name, word.unwrap_or_default()).map_err(|e| at(&e))?,
                ("import", Some(_)) => {}
                ("repeat" | "end", _) if keep => self.body.push_str(&format!("{line}\n")),
                ("repeat" | "end", _) => {}
                _ => return Err(at(&format!("unknown directive {trimmed:?}"))),
            }
        }
        if open.is_empty() { Ok(()) } else { Err(format!("{part}: {} #ifdef without #endif", open.len())) }
    }

    fn import(&mut self, name: &str, word: &str) -> Result<(), String> {
        if self.imported.iter().any(|(n, w)| *n == name && w == word) {
            return Ok(());
        }
        let &(name, source) =
            self.snippets.iter().find(|(n, _)| *n == name).ok_or_else(|| format!("unknown import {name:?}"))?;
        self.imported.push((name, word.into()));
        self.add(name, &source.replace("$n", word))
    }
}

/// Writes `body` to `out` with its `#repeat` blocks written out.
fn repeat(body: &str, constants: &[(&str, u32)], out: &mut String) -> Result<(), String> {
    let mut lines = body.lines();
    while let Some(line) = lines.next() {
        let words: Vec<_> = line.split_whitespace().collect();
        match *words.as_slice() {
            ["#end"] => return Err("#end without #repeat".into()),
            ["#repeat", name, count] => {
                let constant = constants.iter().find(|(n, _)| *n == count).map(|(_, value)| *value);
                let times = constant.or_else(|| count.parse().ok()).ok_or(format!("unknown count {count:?}"))?;
                let mut depth = 1;
                let mut block = String::new();
                for line in lines.by_ref() {
                    match line.split_whitespace().next() {
                        Some("#repeat") => depth += 1,
                        Some("#end") => depth -= 1,
                        _ => {}
                    }
                    if depth == 0 {
                        break;
                    }
                    block.push_str(&format!("{line}\n"));
                }
                if depth != 0 {
                    return Err("#repeat without #end".into());
                }
                for i in 0..times {
                    repeat(&block.replace(&format!("${name}"), &i.to_string()), constants, out)?;
                }
            }
            ["#repeat", ..] => return Err(format!("a #repeat takes a name and a count: {line:?}")),
            _ => out.push_str(&format!("{line}\n")),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::Assembler;

    const SNIPPETS: &[(&str, &str)] = &[
        ("low", "fn low() {}\n"),
        ("high", "#import low\nfn high() {}\n"),
        ("half", "enable f16;\nfn half() {}\n"),
        ("each", "#import low\n#ifdef A$n\nvar x$n;\n#else\nvar y$n;\n#endif\n"),
    ];

    #[test]
    fn imports_come_once_and_constants_first() {
        let out = Assembler::assemble("#import high\n  #import low\nfn main() {}\n", SNIPPETS, &[], &[("N", 7)]);
        assert_eq!(out.as_deref(), Ok("const N: u32 = 7u;\nfn low() {}\nfn high() {}\nfn main() {}\n"));
    }

    #[test]
    fn a_word_makes_a_snippet_of_its_own() {
        let main = "#import each\n#import each 2\n#import each\n#import each 2\n";
        let out = Assembler::assemble(main, SNIPPETS, &["A2"], &[]);
        assert_eq!(out.as_deref(), Ok("fn low() {}\nvar y;\nvar x2;\n"));
    }

    #[test]
    fn enables_move_to_the_front() {
        let out = Assembler::assemble("enable f16;\nfn main() {}\n#import half\n", SNIPPETS, &[], &[("N", 7)]);
        assert_eq!(out.as_deref(), Ok("enable f16;\nconst N: u32 = 7u;\nfn main() {}\nfn half() {}\n"));
    }

    #[test]
    fn conditionals_nest() {
        let main = "#ifdef A\na\n#ifndef B\nb\n#else\nc\n#endif\n#else\nd\n#ifdef B\n#import low\n#endif\n#endif\ne\n";
        let with = |defines: &[&str]| Assembler::assemble(main, SNIPPETS, defines, &[]);
        assert_eq!(with(&[]).as_deref(), Ok("d\ne\n"));
        assert_eq!(with(&["A"]).as_deref(), Ok("a\nb\ne\n"));
        assert_eq!(with(&["A", "B"]).as_deref(), Ok("a\nc\ne\n"));
        assert_eq!(with(&["B"]).as_deref(), Ok("d\nfn low() {}\ne\n"));
    }

    #[test]
    fn repeats_nest_and_count_constants() {
        let main = "#repeat h N\na$h\n#repeat k 2\nb$h$ku\n#end\n#end\nc\n";
        let out = Assembler::assemble(main, SNIPPETS, &[], &[("N", 2)]);
        assert_eq!(out.as_deref(), Ok("const N: u32 = 2u;\na0\nb00u\nb01u\na1\nb10u\nb11u\nc\n"));
    }

    #[test]
    fn mistakes_are_named() {
        for (main, part) in [
            ("#import nowhere\n", "unknown import \"nowhere\""),
            ("x\n#ifdef A\n", "main: 1 #ifdef without #endif"),
            ("#endif\n", "main, line 1: #endif without #ifdef"),
            ("#else\n", "#else without #ifdef"),
            ("#ifdef A\n#else\n#else\n#endif\n", "line 3: a second #else"),
            ("#ifdef\n#endif\n", "unknown directive"),
            ("#define A\n", "unknown directive"),
            ("#end\n", "#end without #repeat"),
            ("#repeat h 2\n", "#repeat without #end"),
            ("#repeat h M\n#end\n", "unknown count \"M\""),
            ("#repeat h\n#end\n", "takes a name and a count"),
            ("#ifdef A B\n#endif\n", "more words after the directive than 1"),
            ("#import low 2 3\n", "more words after the directive than 2"),
        ] {
            let error = Assembler::assemble(main, SNIPPETS, &[], &[]).err();
            assert!(error.as_ref().is_some_and(|e| e.contains(part)), "{main:?}: {error:?}");
        }
    }
}
