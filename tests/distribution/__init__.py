"""What `make dist` builds: looked through, installed into an empty environment, and tried there as README says."""
