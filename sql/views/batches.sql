-- Batches as their users see them.

create or replace view pgharness.batches_progress with (security_invoker = true) as
select b.id as batch_id, b.run_id, r.name as run, b.kind, m.name as model, b.status, b.request_count as requests,
       b.succeeded_count as succeeded, b.failed_count as failed, b.unanswered_count as unanswered,
       round(extract(epoch from coalesce(b.finished_at, pgharness.clock()) - b.created_at), 1) as age_seconds,
       case when b.finished_at is null then round(extract(epoch from b.deadline_at - pgharness.clock()), 1) end as seconds_to_deadline,
       case when b.finished_at is null then b.due_at end as next_step_at,
       b.external_id, b.error, b.created_at, b.submitted_at, b.ended_at, b.finished_at, b.worker_id, b.finished_at is null as is_open
  from pgharness.batches as b
  join pgharness.runs as r on r.id = b.run_id
  join pgharness.models as m on m.id = b.model_id;
comment on view pgharness.batches_progress is
'One row per batch of a run: which model it asks, how far it is, and what came of it. Example: select * from pgharness.batches_progress where run_id = 1 order by batch_id;';
comment on column pgharness.batches_progress.kind is 'What its requests ask for: note or grade.';
comment on column pgharness.batches_progress.status is
'planned (items are gathered), uploading, submitting, submitted (the vendor works on it), ended (its results are being collected), collected, cancelled or failed.';
comment on column pgharness.batches_progress.requests is 'Items in it.';
comment on column pgharness.batches_progress.succeeded is 'Items that it made.';
comment on column pgharness.batches_progress.failed is 'Items whose try in it failed; they are tried again as others are.';
comment on column pgharness.batches_progress.unanswered is 'Items that came back without an answer, at no cost.';
comment on column pgharness.batches_progress.age_seconds is 'Since the first item was gathered, until it was finished.';
comment on column pgharness.batches_progress.seconds_to_deadline is 'Until it is cancelled and the rest asked live; negative when that has begun.';
comment on column pgharness.batches_progress.next_step_at is 'When a worker looks at it next.';
comment on column pgharness.batches_progress.external_id is 'What the vendor calls it.';
comment on column pgharness.batches_progress.error is 'Why its last step failed, or why it did.';
comment on column pgharness.batches_progress.submitted_at is 'When the vendor took it.';
comment on column pgharness.batches_progress.ended_at is 'When the vendor was done with it.';
comment on column pgharness.batches_progress.is_open is 'Whether it is not finished yet.';
