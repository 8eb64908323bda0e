// The Vercel AI SDK: text, streams, media, tools and typed output, through its OpenAI and OpenAI-compatible providers.
import assert from "node:assert/strict";
import fs from "node:fs";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { Output, experimental_transcribe as transcribe, generateText, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";
import { ANSWER, BASE_URL, CLIP, DESCRIPTION, MODEL, PICTURE, QUESTION, TRANSCRIPT } from "./samples.mjs";

const openai = createOpenAI({ baseURL: BASE_URL, apiKey: "none" });
const compatible = createOpenAICompatible({ name: "mmlora", baseURL: BASE_URL, supportsStructuredOutputs: true });
const schema = z.object({ color: z.enum(["red", "green", "blue"]), is_big: z.boolean() });
const painted = [];
const paint = tool({
  description: "Paint the shape",
  inputSchema: z.object({ color: z.enum(["red", "green"]) }),
  execute: async ({ color }) => (painted.push(color), `painted ${color}`),
});

for (const model of [openai(MODEL), openai.chat(MODEL), compatible(MODEL)]) {
  const options = { model, maxRetries: 0, temperature: 0, maxOutputTokens: 512 };
  assert.equal((await generateText({ ...options, prompt: QUESTION })).text, ANSWER);
  const stream = streamText({ ...options, prompt: QUESTION, onError: ({ error }) => assert.fail(String(error)) });
  assert.equal(await stream.text, ANSWER);
  const content = [
    { type: "image", image: fs.readFileSync(PICTURE) },
    { type: "text", text: "describe the picture" },
  ];
  assert.equal((await generateText({ ...options, messages: [{ role: "user", content }] })).text, DESCRIPTION);
  const typed = await generateText({ ...options, prompt: QUESTION, output: Output.object({ schema }) });
  assert.ok(schema.safeParse(typed.output).success);
  painted.length = 0;
  await generateText({ ...options, prompt: QUESTION, tools: { paint }, toolChoice: { type: "tool", toolName: "paint" }, stopWhen: stepCountIs(1) });
  assert.ok(painted.length > 0);
  // A tool and a typed output in one request: either is a valid result of the step.
  const both = await generateText({
    ...options,
    prompt: QUESTION,
    tools: { paint },
    output: Output.object({ schema }),
    stopWhen: stepCountIs(1),
  });
  assert.ok(both.toolCalls.length > 0 || schema.safeParse(both.output).success);
}
const { text } = await transcribe({ model: openai.transcription(MODEL), audio: fs.readFileSync(CLIP), maxRetries: 0 });
assert.equal(text, TRANSCRIPT);
