"""Tables, figures and pages of runs and sweeps, from their files on disk alone."""
