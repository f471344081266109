"""What is asked for, in numbers: degrees, ranks and nodes, units, costs. Nothing here holds memory or talks."""
