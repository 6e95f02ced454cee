//! Cost of one transfer between peers and to host memory, from 2 to 64 ports: it should not grow.
//!
//! `cargo bench -p p2plab-pcie`; with `--no-default-features` the counters are compiled out.
#![allow(missing_docs)]

#[path = "../tests/toy/mod.rs"]
mod toy;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};

fn transfers(criterion: &mut Criterion) {
    for (name, length) in [("64 B", 64usize), ("128 KiB", 128 << 10)] {
        let mut group = criterion.benchmark_group(name);
        let data = vec![0x5a; length];
        for ports in [2usize, 4, 8, 16, 32, 64] {
            let fabric = toy::one_switch(ports);
            let plugged: Vec<_> = (0..ports)
                .map(|n| toy::plug(&fabric, &format!("sw.{n}"), &format!("e{n}"), n as u64))
                .collect();
            let (first, last) = (&plugged[0], &plugged[ports - 1]);
            group.bench_function(BenchmarkId::new("to a peer", ports), |bench| {
                bench.iter(|| first.toy.port().write(last.memory, &data));
            });
            group.bench_function(BenchmarkId::new("to host memory", ports), |bench| {
                bench.iter(|| first.toy.port().write(toy::HOST, &data));
            });
        }
        group.finish();
    }
}

criterion_group!(benches, transfers);
criterion_main!(benches);
