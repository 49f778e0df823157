//! Every row of the shared vectors (pattern, name, whether it matches).

use tidegate_policy::Name;
use tidegate_policy::pattern::Pattern;

/// All rows hold as they are: our grammar gives runs of stars the same meaning as the dialect that the vectors come from.
#[test]
fn every_vector_holds() {
    let text = include_str!("vectors/fqdn_patterns.tsv");
    let mut rows = 0;
    for line in text.lines().skip(1) {
        let mut cells = line.split('\t');
        let (Some(pattern), Some(name), Some(expected), None) =
            (cells.next(), cells.next(), cells.next(), cells.next())
        else {
            panic!("a row has three cells: {line:?}");
        };
        let pattern = Pattern::parse(pattern).unwrap_or_else(|e| panic!("{pattern}: {e}"));
        // What is no valid name matches nothing.
        let got = Name::parse(name).is_ok_and(|n| pattern.matches(n.as_str()));
        assert_eq!(got, expected == "match", "{line}");
        rows += 1;
    }
    assert_eq!(rows, text.lines().count() - 1);
}
