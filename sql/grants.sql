-- Roles: pgharness_reader sees, pgharness_author defines and starts, pgharness_worker does the work. Applied last, and again at every migrate.

revoke all on schema pgharness from public;
revoke all on all tables in schema pgharness from public;
revoke all on all functions in schema pgharness from public;

do $$
declare
    v_role     text;
    v_function regprocedure;
begin
    foreach v_role in array array['pgharness_reader', 'pgharness_author', 'pgharness_worker'] loop
        if not exists (select from pg_roles where rolname = v_role) then
            begin
                execute format('create role %I nologin', v_role);
            exception when duplicate_object or unique_violation then
                null;                                   -- an installer in another database of the cluster was faster
            end;
        end if;
    end loop;

    grant usage on schema pgharness to pgharness_reader, pgharness_author, pgharness_worker;
    grant select on all tables in schema pgharness to pgharness_reader, pgharness_author, pgharness_worker;
    grant usage on schema procrastinate to pgharness_reader, pgharness_author, pgharness_worker;
    grant select on procrastinate.procrastinate_jobs, procrastinate.procrastinate_events to pgharness_reader, pgharness_author;

    -- reading: the functions that views and plain look-ups need
    grant execute on function pgharness.clock(), pgharness._note_place(pgharness.run_definitions, bigint),
        pgharness._grade_place(pgharness.run_combinations, integer), pgharness._target_criteria(), pgharness._run_progress(pgharness.runs), pgharness._cell_count(bigint), pgharness._cost_usd(pgharness.runs), pgharness._priced(pgharness.models, timestamptz),
        pgharness._token_cost(pgharness.models, double precision, double precision, double precision),
        pgharness._text_cost(pgharness.models, double precision, double precision), pgharness.costs_per_correct(bigint, double precision), pgharness._score_sums(bigint, bigint),
        pgharness._note_sums(bigint, bigint), pgharness._pair_sums(bigint, bigint), pgharness._spread_sums(bigint, bigint),
        pgharness._call_latencies(bigint), pgharness._open_blocks(bigint, text),
        pgharness.recent_latencies(bigint[], bigint[]), pgharness._hedging_latencies(bigint, bigint, text, bigint),
        pgharness.score_plan(bigint), pgharness._check_id(text, bigint, text), pgharness.analysis_digest(bigint[]), pgharness._student_t(bigint),
        pgharness._case_scores(bigint), pgharness.paired_run_differences(text, text), pgharness._run_id(text), pgharness._refuse_unknown(text, text, text[], text) to pgharness_reader, pgharness_worker;

    -- defining and starting: inputs are written by insert; runs by insert or through functions that hold the privilege
    grant insert, update, delete on pgharness.model_prices, pgharness.projects, pgharness.experiments, pgharness.datasets, pgharness.cases, pgharness.rubrics,
        pgharness.models, pgharness.model_combinations, pgharness.instances, pgharness.instance_cases to pgharness_author;
    grant insert (name, instance_id, instance, kind, idempotency_key, rerun_of_id, priority, budget_usd, max_concurrency, batch_deadline_seconds, response_cache) on pgharness.runs to pgharness_author;
    grant execute on all functions in schema pgharness to pgharness_author;
    for v_function in
        select p.oid from pg_proc as p where p.pronamespace = 'pgharness'::regnamespace and p.prosecdef and p.proname like '\_%'
    loop
        -- what a public function does with the owner's privileges is for that function alone
        execute format('revoke execute on function %s from pgharness_author', v_function);
    end loop;
    revoke execute on function
        pgharness.load_run(bigint), pgharness.load_inputs(bigint, bigint[], bigint[], bigint[]),
        pgharness.load_slice(bigint, jsonb), pgharness.next_run(text[]), pgharness.take_job(text[], bigint, bigint[], bigint[], text[], jsonb),
        pgharness.record_outcomes(bigint, jsonb, boolean), pgharness.charge_crash(bigint, text, bigint),
        pgharness.register_worker(text, integer, text, text[], integer, jsonb), pgharness.attach_queue_worker(bigint, bigint),
        pgharness.heartbeat(bigint, jsonb, text, bigint[], bigint[], integer), pgharness.share_slice(bigint, bigint, bigint[]), pgharness.lose_worker(text, integer), pgharness.sweep(interval), pgharness.settle_scores(bigint, bigint, integer, bigint),
        pgharness.lease_model(bigint, bigint, integer, integer, double precision, integer, integer, double precision, boolean, double precision, integer, integer, text), pgharness.lease_run(bigint, bigint, integer, integer), pgharness.take_requests(bigint, integer, bigint),
        pgharness.block_model(bigint, double precision),
        pgharness.seek_responses(bigint, bytea[], bytea[], double precision[]), pgharness.release_responses(bigint, bytea[]), pgharness.keep_responses(jsonb),
        pgharness.add_tasks(bigint, bigint, integer, text, text, text, integer), pgharness.map_state(bigint, bigint[], text[]), pgharness.map_results(bigint, bigint, text),
        pgharness.load_code(bigint), pgharness.load_tasks(bigint, jsonb), pgharness.start_version(bigint, bigint), pgharness.record_tasks(bigint, bigint, jsonb),
        pgharness.lose_tasks(bigint, bigint[], integer[], text, integer), pgharness.fail_run(bigint, text), pgharness.expire_runs(),
        pgharness.record_told(bigint, bigint, text, bigint, jsonb, jsonb), pgharness.keep_artifact(bigint, text, bigint, bigint, integer, text, text, bytea),
        pgharness.serve_experiments(bigint, text[]), pgharness.load_model(text), pgharness.join_queue(bigint), pgharness.end_slice(bigint),
        pgharness.next_batch(bigint, text[], bigint[]), pgharness.load_batch(bigint, bigint, integer, bigint[]), pgharness.split_batch(bigint, bigint, bigint),
        pgharness.begin_submission(bigint, bigint, integer, text), pgharness.record_submission(bigint, bigint, text, boolean), pgharness.forget_submission(bigint, bigint, text),
        pgharness.record_poll(bigint, bigint, boolean, text[], boolean), pgharness.finish_batch(bigint, bigint, text, boolean), pgharness.release_batch(bigint, bigint, text, double precision),
        pgharness.take_analysis(bigint, bigint), pgharness.finish_analysis(bigint, bigint, text, jsonb, jsonb), pgharness.fail_analysis(bigint, bigint, text, text),
        pgharness.take_report(bigint, bigint), pgharness.finish_report(bigint, bigint, text, text, jsonb), pgharness.fail_report(bigint, bigint, text, text)
        from pgharness_author;

    -- archiving deletes what the harness wrote: for the owner, as deleting a run is
    revoke execute on function
        pgharness.detach_run(bigint, text, text, bigint, jsonb), pgharness.begin_restore(bigint, text),
        pgharness.restore_rows(bigint, text, json), pgharness.finish_restore(bigint)
        from pgharness_author;

    -- working: the queue's own tables and functions, and the work functions; no insert, update or delete of ours
    grant select, insert, update, delete on all tables in schema procrastinate to pgharness_worker;
    grant usage on all sequences in schema procrastinate to pgharness_worker;
    grant execute on all functions in schema procrastinate to pgharness_worker;
    grant execute on function
        pgharness.load_run(bigint), pgharness.load_inputs(bigint, bigint[], bigint[], bigint[]),
        pgharness.load_slice(bigint, jsonb), pgharness.next_run(text[]), pgharness.take_job(text[], bigint, bigint[], bigint[], text[], jsonb),
        pgharness.record_outcomes(bigint, jsonb, boolean), pgharness.charge_crash(bigint, text, bigint),
        pgharness.register_worker(text, integer, text, text[], integer, jsonb), pgharness.attach_queue_worker(bigint, bigint),
        pgharness.heartbeat(bigint, jsonb, text, bigint[], bigint[], integer), pgharness.share_slice(bigint, bigint, bigint[]), pgharness.lose_worker(text, integer), pgharness.sweep(interval), pgharness.settle_scores(bigint, bigint, integer, bigint),
        pgharness.lease_model(bigint, bigint, integer, integer, double precision, integer, integer, double precision, boolean, double precision, integer, integer, text), pgharness.lease_run(bigint, bigint, integer, integer), pgharness.take_requests(bigint, integer, bigint),
        pgharness.block_model(bigint, double precision),
        pgharness.seek_responses(bigint, bytea[], bytea[], double precision[]), pgharness.release_responses(bigint, bytea[]), pgharness.keep_responses(jsonb),
        pgharness.add_tasks(bigint, bigint, integer, text, text, text, integer), pgharness.map_state(bigint, bigint[], text[]), pgharness.map_results(bigint, bigint, text),
        pgharness.load_code(bigint), pgharness.load_tasks(bigint, jsonb), pgharness.start_version(bigint, bigint), pgharness.record_tasks(bigint, bigint, jsonb),
        pgharness.lose_tasks(bigint, bigint[], integer[], text, integer), pgharness.fail_run(bigint, text), pgharness.expire_runs(),
        pgharness.record_told(bigint, bigint, text, bigint, jsonb, jsonb), pgharness.keep_artifact(bigint, text, bigint, bigint, integer, text, text, bytea),
        pgharness.serve_experiments(bigint, text[]), pgharness.load_model(text), pgharness.join_queue(bigint), pgharness.end_slice(bigint),
        pgharness.next_batch(bigint, text[], bigint[]), pgharness.load_batch(bigint, bigint, integer, bigint[]), pgharness.split_batch(bigint, bigint, bigint),
        pgharness.begin_submission(bigint, bigint, integer, text), pgharness.record_submission(bigint, bigint, text, boolean), pgharness.forget_submission(bigint, bigint, text),
        pgharness.record_poll(bigint, bigint, boolean, text[], boolean), pgharness.finish_batch(bigint, bigint, text, boolean), pgharness.release_batch(bigint, bigint, text, double precision),
        pgharness.take_analysis(bigint, bigint), pgharness.finish_analysis(bigint, bigint, text, jsonb, jsonb), pgharness.fail_analysis(bigint, bigint, text, text),
        pgharness.take_report(bigint, bigint), pgharness.finish_report(bigint, bigint, text, text, jsonb), pgharness.fail_report(bigint, bigint, text, text),
        pgharness.register_experiment(text, text, text, text, text, text, jsonb, double precision, integer, integer, text, boolean, text, boolean),
        pgharness.log(bigint, text, text, jsonb), pgharness.record_result(bigint, text, jsonb)
        to pgharness_worker;
exception when insufficient_privilege then
    raise warning 'pgharness roles were not set up (%): only the owner of schema pgharness can use it', sqlerrm;
end;
$$;
