-- Outcomes say in which epoch they were tried. Workers are stopped while a migration runs; the type is in no table.

alter type pgharness.outcome add attribute epoch integer;
comment on column pgharness.outcome.epoch is 'The epoch of the slice that it was tried in; null counts as the run''s present one.';
