"""Where Mantle runs: `port` is the contract, `machine` one Linux machine, `kubernetes` (later) a cluster."""
