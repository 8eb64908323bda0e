// The official Node client: chat, streams, media, tools, structured output, Responses, transcription.
import assert from "node:assert/strict";
import fs from "node:fs";
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";
import { ANSWER, BASE_URL, CLIP, DESCRIPTION, MODEL, PICTURE, QUESTION, TRANSCRIPT, encode } from "./samples.mjs";

const client = new OpenAI({ baseURL: BASE_URL, apiKey: "none", maxRetries: 0 });
const Shape = z.object({ color: z.enum(["red", "green", "blue"]), is_big: z.boolean() });
const options = { model: MODEL, temperature: 0, max_tokens: 512 };
const user = (content) => [{ role: "user", content }];
const picture = { type: "image_url", image_url: { url: `data:image/png;base64,${encode(PICTURE)}` } };
const clip = { type: "input_audio", input_audio: { data: encode(CLIP), format: "flac" } };

for (const [content, expected] of [
  [QUESTION, ANSWER],
  [[picture, { type: "text", text: "describe the picture" }], DESCRIPTION],
  [[clip, { type: "text", text: "transcribe the audio" }], TRANSCRIPT],
]) {
  const whole = await client.chat.completions.create({ messages: user(content), ...options });
  assert.equal(whole.choices[0].message.content, expected);
  let text = "";
  for await (const chunk of await client.chat.completions.create({ messages: user(content), stream: true, ...options }))
    text += chunk.choices[0]?.delta?.content ?? "";
  assert.equal(text, expected);
}
const parsed = await client.chat.completions.parse({
  messages: user(QUESTION),
  response_format: zodResponseFormat(Shape, "shape"),
  ...options,
});
assert.ok(Shape.safeParse(parsed.choices[0].message.parsed).success);
const painted = [];
const runner = client.chat.completions.runTools({
  messages: user(QUESTION),
  tool_choice: { type: "function", function: { name: "paint" } },
  tools: [
    {
      type: "function",
      function: {
        name: "paint",
        function: ({ color }) => (painted.push(color), `painted ${color}`),
        parse: JSON.parse,
        parameters: { type: "object", properties: { color: { enum: ["red", "green"] } }, required: ["color"], additionalProperties: false },
      },
    },
  ],
  ...options,
});
await runner.done();
assert.ok(painted.length > 0);
const response = await client.responses.create({ model: MODEL, input: QUESTION, temperature: 0, max_output_tokens: 512 });
assert.equal(response.output_text, ANSWER);
const heard = await client.audio.transcriptions.create({ model: MODEL, file: fs.createReadStream(CLIP) });
assert.equal(heard.text, TRANSCRIPT);
