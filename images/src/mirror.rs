//! Which Debian mirror to use: the one that this machine's apt already uses.

/// Suites that only Debian itself has, before any `-updates` or `-backports`.
const DEBIAN_SUITES: [&str; 12] = [
    "bullseye",
    "bookworm",
    "trixie",
    "forky",
    "duke",
    "sid",
    "stable",
    "oldstable",
    "oldoldstable",
    "testing",
    "unstable",
    "experimental",
];

/// Base addresses of Debian mirrors in the output of `apt-get update --print-uris`, the likeliest first.
///
/// Such a line is `'ADDRESS/dists/SUITE/InRelease' FILE SIZE`. Security archives have no backports
/// and are left out. Third parties use Debian's suite names too, but offer fewer of them, so the mirror with
/// the most suites comes first.
#[must_use]
pub fn debian_mirrors(print_uris: &str) -> Vec<String> {
    let mut found: Vec<(String, Vec<&str>)> = Vec::new();
    for line in print_uris.lines() {
        let Some(uri) = line.strip_prefix('\'').and_then(|l| l.split('\'').next()) else {
            continue;
        };
        let Some(path) = uri.strip_suffix("/InRelease") else {
            continue;
        };
        let Some((base, suite)) = path.rsplit_once("/dists/") else {
            continue;
        };
        if base.contains("debian-security") || suite.contains("-security") || suite.contains('/') {
            continue;
        }
        let stem = suite.split('-').next().unwrap_or(suite);
        if !DEBIAN_SUITES.contains(&stem) {
            continue;
        }
        match found.iter_mut().find(|(b, _)| b == base) {
            Some((_, suites)) if !suites.contains(&suite) => suites.push(suite),
            Some(_) => {}
            None => found.push((base.to_owned(), vec![suite])),
        }
    }
    // Stable: among equals the order of the machine's configuration counts.
    found.sort_by_key(|(base, suites)| {
        (std::cmp::Reverse(suites.len()), !base.ends_with("/debian"))
    });
    found.into_iter().map(|(base, _)| base).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_the_archive_and_neither_security_nor_third_parties() {
        let output = "\
'http://third.example.org/linux/debian/dists/bookworm/InRelease' third_InRelease 0 \n\
'http://mirror.example.org/debian-security/dists/bookworm-security/InRelease' s_InRelease 0 \n\
'http://mirror.example.org/debian/dists/bookworm/InRelease' m_InRelease 0 \n\
'http://mirror.example.org/debian/dists/bookworm-updates/InRelease' mu_InRelease 0 \n\
'http://mirror.example.org/debian/dists/bookworm/main/binary-amd64/Packages.xz' m_Packages 0 \n\
'https://node.example.org/node_20.x/dists/nodistro/InRelease' n_InRelease 0 \n\
W: some warning\n";
        assert_eq!(
            debian_mirrors(output),
            [
                "http://mirror.example.org/debian",
                "http://third.example.org/linux/debian"
            ]
        );
    }

    #[test]
    fn a_mirror_may_have_any_path_or_scheme() {
        let output = "'mirror+file:/etc/apt/mirrors/debian.list/dists/trixie/InRelease' x 0\n";
        assert_eq!(
            debian_mirrors(output),
            ["mirror+file:/etc/apt/mirrors/debian.list"]
        );
    }

    #[test]
    fn other_distributions_and_noise_give_none() {
        let output = "'http://archive.example.org/ubuntu/dists/noble/InRelease' x 0\n\
                      'http://x.example.org/dists/trixie'\n'\n''\n'/dists/InRelease'\n";
        assert!(debian_mirrors(output).is_empty());
    }
}
