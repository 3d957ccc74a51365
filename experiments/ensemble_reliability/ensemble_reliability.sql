-- Ensemble reliability: is a vote of 3, 5 or 7 models right more often than the best of them alone, and what does that cost?
--
-- 200 questions, 3 repetitions. Can be applied twice. The models are simulated: they differ in ability and find the same
-- questions hard, as real ones do. For real models, insert them and name seven here, the best one first:
--   psql -v models=gpt-a,claude-b,gemini-c,qwen-d,llama-e,mistral-f,phi-g -f ensemble_reliability.sql

\if :{?models}
\else
    \set models reliability/1,reliability/2,reliability/3,reliability/4,reliability/5,reliability/6,reliability/7
\endif

insert into pgharness.models (name, description, provider, parameters, input_usd_per_million, output_usd_per_million)
select 'reliability/' || n, 'Simulated: of seven models the ' || case n when 1 then 'best.' else 'number ' || n || '.' end, 'simulator',
       jsonb_build_object('latency_seconds', 0.02, 'ability', 2.4 - 0.15 * n, 'discrimination', 1.2,
                          'error_group', 'reliability', 'error_correlation', 0.3), 10.0 / n, 40.0 / n
  from generate_series(1, 7) as n
on conflict do nothing;

-- The members of each panel are named here alone; applied again with other models, the panels follow.
insert into pgharness.models (name, description, provider, parameters)
select 'reliability/panel-' || size, format('The vote of %s models.', size), 'ensemble',
       jsonb_build_object('members', to_jsonb((string_to_array(:'models', ','))[1:size]), 'vote', 'majority', 'normalise', 'number')
  from unnest('{3,5,7}'::integer[]) as size
on conflict (name) do update set parameters = excluded.parameters;

insert into pgharness.datasets (name, description, source, license)
values ('reliability', 'Invented sums, each with a difficulty from 0 to 1.', 'made by this script', 'none needed')
on conflict do nothing;

insert into pgharness.cases (name, dataset, input, target, metadata)
select format('reliability/%s', lpad(n::text, 3, '0')), 'reliability',
       to_jsonb(format('A shop sells %s boxes of %s pencils and %s single pencils. How many pencils is that? Answer with the number alone.',
                       n % 17 + 2, n % 23 + 3, n % 29)),
       to_jsonb(((n % 17 + 2) * (n % 23 + 3) + n % 29)::text), jsonb_build_object('difficulty', round(n * 37 % 200 / 200.0, 3))
  from generate_series(1, 200) as n
on conflict do nothing;

insert into pgharness.instances (name, experiment, description, note_replications, seed)
values ('ensemble-reliability', 'note_grade', 'The best model alone against votes of three, five and seven.', 3, 1)
on conflict do nothing;

select pgharness.add_cases('ensemble-reliability', dataset => 'reliability') as cases_added;

insert into pgharness.model_combinations (instance, name, generator, grader)
select 'ensemble-reliability', 'single', (string_to_array(:'models', ','))[1], 'numeric_match'
union all
select 'ensemble-reliability', 'panel of ' || size, 'reliability/panel-' || size, 'numeric_match' from unnest('{3,5,7}'::integer[]) as size
on conflict (instance_id, name) do update set generator = excluded.generator;
