"""How traffic is shared among the applications of an endpoint: as written, by capacity, or following the load."""
