-- Hedging: does a second request, sent when the first is slow, cut the slowest answers, and what does that cost?
--
-- 1,000 calls a repetition, baseline against hedged at the 95th percentile. Can be applied twice: with another seed for another
-- repetition, as a simulated model draws everything from it. The model is simulated: lognormal latency, and 2% of the calls 20
-- times slower. For a real model:
--   psql -v model=gpt-a -f hedging.sql

\if :{?model}
\else
    \set model hedging/slow-tail
\endif
\if :{?seed}
\else
    \set seed 2
\endif

insert into pgharness.models (name, description, provider, parameters, input_usd_per_million, output_usd_per_million)
values ('hedging/slow-tail', 'Simulated: one call in fifty takes twenty times as long.', 'simulator',
        '{"latency_seconds": 0.1, "latency_spread": 0.3, "latency_tail_rate": 0.02, "latency_tail_factor": 20, "quality": 1}', 1.00, 4.00)
on conflict do nothing;

insert into pgharness.models (name, description, provider, parameters)
values ('hedging/hedged', 'Asks again when an answer takes longer than 95% of them.', 'hedge',
        jsonb_build_object('members', jsonb_build_array(:'model'), 'delay', '{"strategy": "percentile", "percentile": 95}'::jsonb))
on conflict (name) do update set parameters = excluded.parameters;

insert into pgharness.datasets (name, description, source, license)
values ('hedging', 'Invented questions.', 'made by this script', 'none needed')
on conflict do nothing;

insert into pgharness.cases (name, dataset, input, target)
select format('hedging/%s', lpad(n::text, 4, '0')), 'hedging',
       to_jsonb(format('How much is %s plus %s? Answer with the number alone.', n, n % 97)), to_jsonb((n + n % 97)::text)
  from generate_series(1, 1000) as n
on conflict do nothing;

insert into pgharness.instances (name, experiment, description, seed)
values ('hedging', 'note_grade', 'The same model plain and hedged, on the same 1,000 questions.', :'seed')
on conflict (name) do update set seed = excluded.seed;

select pgharness.add_cases('hedging', dataset => 'hedging') as cases_added;

insert into pgharness.model_combinations (instance, name, generator, grader)
values ('hedging', 'baseline', :'model', 'numeric_match'), ('hedging', 'hedged', 'hedging/hedged', 'numeric_match')
on conflict (instance_id, name) do update set generator = excluded.generator;
