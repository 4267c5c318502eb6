//! Machines move between two nodes, each with its own containerd and libvirtd. Brings both
//! up by `hack/up --nodes 2` in `$DYAD_E2E_DIR-mm`, and takes them down. One environment,
//! one test: its steps run one after the other, each with pods of its own, and none may
//! leave anything behind.
//!
//! `DYAD_E2E_MIGRATIONS=long` adds what takes minutes; `DYAD_E2E_STEP` names a part of the
//! steps to run.

mod addresses;
mod leftovers;
mod limits;
mod made;
mod matrix;
mod pod;
mod refusals;
mod seamless;
mod transport;

use std::time::Instant;

use anyhow::Result;
use dyad_e2e::nodes::Nodes;

use leftovers::Leftovers;

type Step = (&'static str, fn(&Nodes) -> Result<()>);

macro_rules! steps {
    ($($module:ident::$name:ident,)*) => {
        [$((stringify!($name), $module::$name as fn(&Nodes) -> Result<()>)),*]
    };
}

const STEPS: &[Step] = &steps![
    seamless::an_idle_machine_moves_without_a_seam,
    seamless::what_a_pod_has_goes_along,
    seamless::memory_that_changes_arrives_whole,
    seamless::init_containers_have_done_their_work,
    made::dyadctl_makes_the_target,
    addresses::the_source_s_address_goes_after_its_time,
    refusals::what_forbids_it_is_told_before_anything_moves,
    refusals::a_target_that_does_not_fit_is_refused,
    limits::a_time_limit_gives_up_or_brings_it_to_an_end,
    transport::streams_are_encrypted_and_parallel,
    matrix::exactly_one_whoever_dies,
];

const LONG_STEPS: &[Step] = &steps![
    limits::auto_converge_brings_it_to_an_end,
    matrix::who_dies_before_anything_moves,
    matrix::who_dies_while_memory_is_copied,
    matrix::who_dies_while_memory_is_fetched,
    matrix::who_dies_after_the_switch,
    matrix::the_network_breaks_off_in_each_phase,
    leftovers::the_fence_outlives_a_restart_of_the_node,
];

#[test]
fn machines_move_between_two_nodes() {
    let only = std::env::var("DYAD_E2E_STEP").unwrap_or_default();
    let long = std::env::var("DYAD_E2E_MIGRATIONS").as_deref() == Ok("long");
    let steps = STEPS.iter().chain(LONG_STEPS.iter().filter(|_| long));
    let steps: Vec<&Step> = steps.filter(|(name, _)| name.contains(&only)).collect();
    assert!(!steps.is_empty(), "no step's name has {only:?} in it");
    let nodes = Nodes::up("mm").expect("two nodes");
    // What a node keeps from its first pod on is no leftover.
    for node in &nodes.nodes {
        pod::Pod::counting(node).expect("a first pod");
    }
    let mut wrong = Vec::new();
    for (name, step) in steps {
        let marks = nodes.nodes.each_ref().map(|node| node.log_mark());
        let before = Leftovers::before(&nodes);
        let began = Instant::now();
        let result = step(&nodes).and_then(|()| before.none_after(&nodes));
        let took = began.elapsed().as_secs();
        match result {
            Ok(()) => eprintln!("ok: {name} ({took} s)"),
            Err(error) => {
                eprintln!("FAILED: {name} ({took} s): {error:#}");
                for (node, mark) in nodes.nodes.iter().zip(&marks) {
                    eprintln!("{}", node.log_tail(mark, &["sandbox=".into()]));
                }
                wrong.push(name);
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:?}");
}
