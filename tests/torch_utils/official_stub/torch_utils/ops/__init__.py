"""Stand-ins for the official operators: their names, arguments and values, computed in the plainest way."""
