"""The tables of reports: a module for each kind."""
