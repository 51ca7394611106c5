"""What a document must be to stay, beyond its length: `stage` applies, in this order, `language`,
`quality`, `contamination` and `scrub`. All of it works on one document alone, so it runs in any number
of processes."""
