-- The note and grade experiment on the seven PriMock57 consultations that two clinicians wrote rubrics for.
--
-- The README beside this file says where the data come from; import them first. Can be applied twice.

update pgharness.datasets
   set description = 'Mock primary-care consultations, with checklists by clinicians who heard them.',
       source = 'https://github.com/babylonhealth/primock57',
       license = 'CC BY 4.0'
 where name = 'primock57';

-- Real consultations are long (90 turns and more), so simulated notes are too.
insert into pgharness.models (name, description, provider, parameters, input_usd_per_million, output_usd_per_million)
values
    ('primock57/careful', 'Simulated: repeats most of what was said.', 'simulator',
     '{"quality": 0.9, "output_tokens": 1200, "latency_seconds": 0.4}', 3.00, 15.00),
    ('primock57/hasty', 'Simulated: repeats less than half of it.', 'simulator',
     '{"quality": 0.4, "output_tokens": 600, "latency_seconds": 0.2}', 0.25, 1.25),
    ('primock57/grader', 'Simulated: judges how much of each criterion a note covers.', 'simulator',
     '{"noise": 6, "latency_seconds": 0.2}', 1.00, 5.00)
on conflict do nothing;

insert into pgharness.instances (name, experiment, description, note_replications, grade_replications, seed)
values ('primock57', 'note_grade', 'Two simulated scribes on real consultations.', 5, 2, 57)
on conflict do nothing;

select pgharness.add_cases('primock57', eligible => true, dataset => 'primock57') as cases_added;

-- Real models: insert them as in the README of pgharness, and name them here.
insert into pgharness.model_combinations (instance, generator, grader)
values ('primock57', 'primock57/careful', 'primock57/grader'),
       ('primock57', 'primock57/hasty', 'primock57/grader')
on conflict do nothing;

select combination, note_count, grade_count from pgharness.expected_costs where instance = 'primock57' order by combination_id;
