"""Who decides at run time, one file each: (plan, spec) -> Policy, a plan with gates and the answers at them."""
