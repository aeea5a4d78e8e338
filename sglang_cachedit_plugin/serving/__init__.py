"""What the HTTP server answers: reports, refusals, settings in force."""
