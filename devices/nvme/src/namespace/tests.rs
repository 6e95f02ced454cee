use super::*;
use crate::config::Backing;

#[test]
fn extent_refuses_what_leaves_the_namespace() {
    let ns = Namespace::open(1, &NamespaceConfig::memory(1 << 20)).unwrap();
    let last = Extent {
        slba: 2047,
        count: 1,
        offset: 2047 * 512,
        length: 512,
    };
    assert_eq!(ns.extent(2047, 1), Some(last));
    assert_eq!(ns.extent(2047, 2), None);
    assert_eq!(ns.extent(u64::MAX, 1), None);
}

#[test]
fn deallocated_and_zeroed_blocks_read_as_zeros() {
    let ns = Namespace::open(1, &NamespaceConfig::memory(1 << 20)).unwrap();
    ns.file.write_all_at(&[7; 8192], 0).unwrap();
    ns.write_zeroes(&ns.extent(1, 8).unwrap()).unwrap();
    let mut data = [0; 8192];
    ns.file.read_exact_at(&mut data, 0).unwrap();
    assert!(data[..512].iter().all(|b| *b == 7));
    assert!(data[512..4608].iter().all(|b| *b == 0));
    assert!(data[4608..].iter().all(|b| *b == 7));
}

#[test]
fn a_file_has_one_writer_or_any_number_of_readers() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    std::fs::write(&path, [0; 4096]).unwrap();
    let writer = NamespaceConfig::file(&path);
    let reader = NamespaceConfig {
        read_only: true,
        ..writer.clone()
    };
    let open = |config| Namespace::open(1, config);
    for (first, second, together) in [
        (&writer, &writer, false),
        (&writer, &reader, false),
        (&reader, &writer, false),
        (&reader, &reader, true),
    ] {
        let _first = open(first).unwrap();
        let second = open(second);
        assert_eq!(second.is_ok(), together, "{second:?}");
        if let Err(error) = second {
            let said = error.to_string();
            assert!(said.contains("disk`: another lab"), "{said}");
        }
    }
    open(&writer).unwrap();
}

#[test]
fn bad_backings_are_refused_in_one_sentence() {
    let dir = tempfile::tempdir().unwrap();
    let missing = dir.path().join("missing");
    let error = Namespace::open(3, &NamespaceConfig::file(&missing)).unwrap_err();
    assert!(
        error.to_string().contains("namespace 3: cannot open"),
        "{error}"
    );

    let small = dir.path().join("small");
    std::fs::write(&small, [0; 1024]).unwrap();
    let mut config = NamespaceConfig::file(&small);
    config.backing = Backing::File {
        path: small.clone(),
        size: Some(4096),
        create: true,
    };
    let error = Namespace::open(1, &config).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("has 1024 bytes, the namespace 4096"),
        "{error}"
    );
    assert_eq!(std::fs::metadata(&small).unwrap().len(), 1024);

    config = NamespaceConfig::memory(1000);
    let error = Namespace::open(1, &config).unwrap_err();
    assert!(
        error.to_string().contains("multiple of the block size 512"),
        "{error}"
    );

    let created = dir.path().join("created");
    config.backing = Backing::File {
        path: created.clone(),
        size: Some(8192),
        create: true,
    };
    assert_eq!(Namespace::open(1, &config).unwrap().blocks, 16);
    assert_eq!(std::fs::metadata(&created).unwrap().len(), 8192);
}

/// The kernel tells of lost writes once: a flush that failed must not be followed by one that succeeds.
#[test]
fn a_failed_flush_is_not_forgotten() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    std::fs::write(&path, [0; 8192]).unwrap();
    let mut config = NamespaceConfig::file(&path);
    config.metadata = crate::config::Metadata::Plain;
    let mut ns = Namespace::open(1, &config).unwrap();
    ns.flush().unwrap();
    // A device that cannot be flushed.
    let file = ns.metadata.replace(File::open("/dev/zero").unwrap());
    ns.flush().unwrap_err();
    ns.metadata = file;
    ns.flush().unwrap_err();
    // Not even by a format.
    let format = ns.format.without_metadata();
    let (ns, formatted) = Arc::new(ns).formatted(format);
    formatted.unwrap();
    ns.flush().unwrap_err();
    drop(ns);
    Namespace::open(1, &NamespaceConfig::file(&path))
        .unwrap()
        .flush()
        .unwrap();
}
